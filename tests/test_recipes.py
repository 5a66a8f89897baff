"""Recipes against the published settings, written out, and the command line that overrides them."""

import inspect
import json
import math
import re
from dataclasses import asdict, replace

import pytest
from conftest import ROOT
from transformers import AutoConfig

import configuration_ride_bf
from configuration_ride_bf import RideBfConfig
from ride_bf.command_line.options import options_of
from ride_bf.recipes import DEFAULT_RECIPE, RECIPES, TrainingRecipe
from ride_bf.recipes.network_options import NETWORK_DEFAULTS, RESIDUAL_OPTIONS, NetworkOptions
from ride_bf.training.arguments import _HEADINGS, RunArguments, parse_arguments

NAMES = {
    "digits_lt_resnet32",
    "cifar10_lt_resnet32",
    "cifar100_lt_resnet32",
    "imagenet_lt_resnet10",
    "imagenet_lt_resnet50",
    "imagenet_lt_resnext50",
    "inaturalist18_resnet50",
    "places_lt_resnet152",
}
# batch, epochs, rate, weight decay, reweight_factor, diversity_factor, reweight_epoch, steps, gamma
PUBLISHED = {
    "imagenet_lt_resnet10": (512, 120, 0.1, 2e-4, 0.02, -0.2, 80, (60, 80), 0.1),
    "imagenet_lt_resnet50": (400, 100, 0.1, 2e-4, 0.02, -0.2, 80, (60, 80), 0.1),
    "imagenet_lt_resnext50": (256, 100, 0.1, 2e-4, 0.02, -0.2, 80, (60, 80), 0.1),
    "inaturalist18_resnet50": (128, 100, 0.2, 2e-4, 0.015, -0.2, 80, (60, 80), 0.1),
    "cifar100_lt_resnet32": (128, 200, 0.1, 5e-4, 0.05, -0.45, 160, (160, 180), 0.01),
}


WITHOUT_BACKBONE = [name for name, recipe in RECIPES.items() if recipe.backbone is None]


def config_of(recipe):
    """The configuration of a recipe's network, with any backbone in place of one that has to be loaded."""
    backbone = {} if recipe.backbone is None else {"backbone_config": AutoConfig.for_model("vit")}
    return recipe.config(num_labels=100, **backbone)


def test_names():
    assert set(RECIPES) >= NAMES
    assert DEFAULT_RECIPE == "digits_lt_resnet32"
    assert all(name == recipe.name for name, recipe in RECIPES.items())


@pytest.mark.parametrize(
    ("options", "name", "output_dir"),
    [
        ("--data_dir DIR", "probe", "outputs/probe"),
        ("--dataset custom", "probe", "outputs/probe"),
        ("--dataset=custom --data-dir DIR --output_dir mine", "probe", "mine"),
        ("--data_dir DIR --dataset custom --recipe digits_lt_resnet32", "digits_lt_resnet32", None),
        ("--data_dir DIR --dataset imagenet_lt", "digits_lt_resnet32", None),
        ("--data_dir none", "digits_lt_resnet32", "outputs/digits_lt_resnet32"),
        ("", "digits_lt_resnet32", "outputs/digits_lt_resnet32"),
    ],
)
def test_own_images_take_their_own_recipe(options, name, output_dir):
    run, recipe = parse_arguments(options.split())
    assert (run.recipe, recipe.name) == (name, name)
    assert output_dir in (None, run.output_dir)
    assert recipe.dataset == "custom" or name != "probe"


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_settings(name):
    recipe = RECIPES[name]
    assert PUBLISHED[name] == (
        recipe.batch_size,
        recipe.epochs,
        recipe.learning_rate,
        recipe.weight_decay,
        recipe.reweight_factor,
        recipe.diversity_factor,
        recipe.reweight_epoch,
        recipe.lr_steps,
        recipe.lr_gamma,
    )
    assert (recipe.momentum, recipe.nesterov, recipe.schedule, recipe.warmup_epochs) == (0.9, True, "step", 5)
    assert recipe.loss == "ride"


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_makes_a_network_and_goes_through_json(name):
    recipe = RECIPES[name]
    config = config_of(recipe)
    if name in NAMES:
        assert config.num_experts == 3
        assert config.batchformer == ("shared_classifier" if config.stem_type == "cifar" else "insert")
    json.loads(json.dumps(asdict(recipe)))
    assert recipe.description
    assert (recipe.image_size is None) == (recipe.backbone is not None), "a backbone has its own image size"


def test_variants():
    config = {name: config_of(recipe) for name, recipe in RECIPES.items()}
    assert config["imagenet_lt_resnet50_ride"].batchformer == "none"
    ldam, recipe = config["cifar100_lt_resnet32_ldam_drw"], RECIPES["cifar100_lt_resnet32_ldam_drw"]
    assert (ldam.num_experts, ldam.hidden_sizes, ldam.classifier) == (1, [16, 32, 64], "cosine")
    assert (recipe.loss, recipe.weight_decay, recipe.nesterov, recipe.reweight_epoch) == ("ldam", 2e-4, False, 160)
    assert (RECIPES["imagenet_lt_resnet10_ride"].batch_size, RECIPES["imagenet_lt_resnet10_ride"].epochs) == (256, 100)
    distilled = {"imagenet_lt_resnet10": (256, 100, 5), "imagenet_lt_resnet50": (256, 100, 5)}
    distilled |= {"imagenet_lt_resnext50": (256, 100, 5), "inaturalist18_resnet50": (512, 100, 5)}
    distilled |= {"cifar100_lt_resnet32": (128, 200, 20)}
    for name, expected in distilled.items():
        recipe = RECIPES[f"{name}_distilled"]
        assert (recipe.batch_size, recipe.epochs, recipe.warmup_epochs) == expected
    for name, top_k in (("cifar100_lt_resnet32", 30), ("imagenet_lt_resnet10", 30), ("inaturalist18_resnet50", 50)):
        recipe = RECIPES[f"{name}_router"]
        assert (recipe.train_only, recipe.sampler, recipe.sampler_epoch) == ("router", "class_balanced", "images")
        assert (recipe.batch_size, recipe.learning_rate, recipe.weight_decay) == (512, 0.01, 5e-4)
        assert config[f"{name}_router"].router_top_k == top_k
        factors = [recipe.learning_rate_factor(epoch) for epoch in range(recipe.epochs)]
        assert factors == pytest.approx([1.0, 0.9045085, 0.6545085, 0.3454915, 0.0954915])


def test_imagenet_lt_schedule_by_hand():
    recipe = RECIPES["imagenet_lt_resnet50"]
    rates = [recipe.learning_rate * recipe.learning_rate_factor(epoch) for epoch in range(100)]
    warmup = [0.02, 0.04, 0.06, 0.08, 0.1]
    assert rates == pytest.approx(warmup + [0.1] * 55 + [0.01] * 20 + [0.001] * 20)
    # 1-based epochs 81 to 100 are re-weighted
    assert [recipe.reweight(epoch) for epoch in range(100)] == [False] * 80 + [True] * 20


def test_cifar_and_inaturalist_schedules_by_hand():
    cifar, inaturalist = RECIPES["cifar100_lt_resnet32"], RECIPES["inaturalist18_resnet50"]
    rates = [cifar.learning_rate * cifar.learning_rate_factor(epoch) for epoch in range(200)]
    assert rates == pytest.approx([0.02, 0.04, 0.06, 0.08] + [0.1] * 156 + [0.001] * 20 + [0.00001] * 20)
    assert [cifar.reweight(epoch) for epoch in range(200)] == [False] * 160 + [True] * 40
    rates = [inaturalist.learning_rate * inaturalist.learning_rate_factor(epoch) for epoch in range(100)]
    assert rates == pytest.approx([0.04, 0.08, 0.12, 0.16] + [0.2] * 56 + [0.02] * 20 + [0.002] * 20)
    assert [inaturalist.reweight(epoch) for epoch in range(100)] == [False] * 80 + [True] * 20


@pytest.mark.parametrize("name", RECIPES)
def test_every_schedule_epoch_by_epoch(name):
    """base * gamma^(steps passed) * min(1, (1 + e) / W), or the cosine, written again."""
    recipe = RECIPES[name]
    for epoch in range(recipe.epochs):
        warm = 1.0 if recipe.warmup_epochs == 0 else min(1.0, (1 + epoch) / recipe.warmup_epochs)
        if recipe.schedule == "step":
            passed = len([step for step in recipe.lr_steps if step <= epoch])
            expected = recipe.lr_gamma**passed * warm
        elif epoch < recipe.warmup_epochs:
            expected = warm
        else:
            angle = math.pi * (epoch - recipe.warmup_epochs) / (recipe.epochs - recipe.warmup_epochs)
            expected = (1 + math.cos(angle)) / 2
        assert recipe.learning_rate_factor(epoch) == pytest.approx(expected)
        reweighted = recipe.reweight_epoch is not None and epoch + 1 > recipe.reweight_epoch
        assert recipe.reweight(epoch) == reweighted


def test_cosine_schedule_by_hand():
    recipe = replace(RECIPES["cifar100_lt_resnet32"], schedule="cosine", epochs=9, warmup_epochs=5)
    factors = [recipe.learning_rate_factor(epoch) for epoch in range(9)]
    assert factors == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0, 1.0, 0.8535534, 0.5, 0.1464466])


def test_never_reweighted():
    recipe = replace(RECIPES["cifar100_lt_resnet32"], reweight_epoch=None)
    assert not any(recipe.reweight(epoch) for epoch in range(200))


def test_overrides_of_recipe_and_network():
    command = (
        "--recipe cifar100_lt_resnet32 --epochs 3 --lr_steps 1 2 --num_experts 4 --hidden_sizes 16 32 64 "
        "--batchformer none --no_nesterov --seed 7 --learning-rate 0.5"
    )
    run, recipe = parse_arguments(command.split())
    assert run.seed == 7
    assert run.output_dir == "outputs/cifar100_lt_resnet32"
    assert (recipe.epochs, recipe.lr_steps, recipe.nesterov, recipe.learning_rate) == (3, (1, 2), False, 0.5)
    config = recipe.config(num_labels=100)
    assert (config.num_experts, config.hidden_sizes, config.batchformer) == (4, [16, 32, 64], "none")
    untouched = {"description", "batch_size", "weight_decay", "loss", "image_mean"}
    original = RECIPES["cifar100_lt_resnet32"]
    assert all(getattr(recipe, name) == getattr(original, name) for name in untouched)
    assert "groups" not in recipe.network


def test_the_window_of_a_recipe_is_what_one_of_the_authors_gpus_held():
    gpus = {"imagenet_lt_resnet10": 4, "imagenet_lt_resnet50": 4, "imagenet_lt_resnext50": 8}
    gpus |= {"inaturalist18_resnet50": 8, "cifar100_lt_resnet32": 1, "cifar10_lt_resnet32": 1}
    for name, count in gpus.items():
        for recipe in (RECIPES[name], RECIPES.get(f"{name}_distilled", RECIPES[name])):
            assert recipe.batchformer_window == recipe.window_size == recipe.batch_size // count


@pytest.mark.parametrize(("given", "window", "size"), [("global", "global", 32), ("local", "local", 32), ("8", 8, 8)])
def test_the_window_is_a_word_or_a_number(given, window, size, tmp_path):
    _, recipe = parse_arguments(["--batchformer_window", given])
    assert (recipe.batchformer_window, recipe.window_size) == (window, size)
    (tmp_path / "mine.json").write_text(recipe.as_json())
    assert parse_arguments(["--recipe_file", str(tmp_path / "mine.json")])[1] == recipe


def test_no_arguments_are_the_default_recipe():
    run, recipe = parse_arguments([])
    assert recipe == RECIPES[DEFAULT_RECIPE]
    assert run.output_dir == f"outputs/{DEFAULT_RECIPE}"


@pytest.mark.parametrize(
    ("arguments", "messages"),
    [
        ("--recipe imagenet", ["no recipe is called 'imagenet'", "imagenet_lt_resnet10"]),
        ("--epoch 3", ["unknown arguments ['--epoch', '3']", "did you mean --epochs?", "batch_size", "num_experts"]),
        ("--num-expert 3", ["did you mean --num_experts?"]),
        ("--add_bt 33", ["unknown arguments ['--add_bt', '33']", "batchformer"]),
        ("--epochs many", ["--epochs", "invalid int value: 'many'"]),
        ("--loss mse", ["--loss", "invalid choice: 'mse'", "ride", "focal"]),
        ("--dataset places", ["--dataset", "invalid choice: 'places'", "places_lt", "custom"]),
        ("--augmentation heavy", ["--augmentation", "invalid choice: 'heavy'", "imagenet", "digits"]),
        ("--sampler balanced", ["--sampler", "invalid choice: 'balanced'", "class_balanced"]),
        ("--auto_augment much", ["--auto_augment", "invalid choice: 'much'", "randaugment"]),
        ("--batch_size 0", ["batch_size must be 1 or more, not 0"]),
        ("--learning_rate -1", ["learning_rate must be positive, not -1.0"]),
        ("--lr_steps 80 60", ["ascending order, not [80, 60]"]),
        ("--image_size 64 --resize_size 32", ["resize_size 32 is less than image_size 64"]),
        ("--image_mean 0.5", ["image_mean and image_std three numbers"]),
        ("--image_std 0.5 0.5 0", ["image_std must be positive, not 0.5 0.5 0.0"]),
        ("--num_channels 1", ["unknown arguments ['--num_channels', '1']"]),
        ("--momentum 0", ["set --no_nesterov"]),
        ("--momentum 1", ["momentum must be 0 or more and less than 1, not 1.0"]),
        ("--weight_decay -1", ["weight_decay must be 0 or more, not -1.0"]),
        ("--lr_gamma -1", ["lr_gamma must be positive, not -1.0"]),
        ("--class_weight_beta 1", ["class_weight_beta must be 0 or more and less than 1"]),
        ("--diversity_temperature 2", ["unknown arguments ['--diversity_temperature', '2']"]),
        ("--learning_rate inf", ["learning_rate must be a finite number, not inf"]),
        ("--diversity_factor nan", ["diversity_factor must be a finite number, not nan"]),
        ("--cosine_scale nan", ["cosine_scale must be a finite number, not nan"]),
        ("--reweight_factor 2", ["reweight_factor must be 0 to 1, not 2.0"]),
        ("--schedule step --lr_steps -1", ["lr_steps must be 1 or more, not -1"]),
        ("--schedule step --lr_steps 0 2", ["lr_steps must be 1 or more, not 0 2"]),
        ("--reweight_epoch -3", ["reweight_epoch must be 0 or more, not -3"]),
        ("--seed -1", ["seed must be 0 to 4294967295, not -1"]),
        ("--validation_fraction 1.5", ["validation_fraction must be between 0 and 1, not 1.5"]),
        ("--push_to_hub user/x --push_every 0", ["push_every must be 1 or more, not 0"]),
        ("--output_dir=", ["output_dir is empty; give it a value or leave it out"]),
        ("--dataset custom --data_dir=", ["data_dir is empty"]),
        ("--init_from=", ["init_from is empty"]),
        ("--recipe_file=", ["recipe_file"]),
        ("--resume maybe", ["'maybe' is neither true nor false"]),
        ("--resume --overwrite_output_dir", ["deletes the run that --resume continues; give one of them"]),
        ("--reweight_epoch soon", ["invalid int value: 'soon'"]),
        ("--recipe digits_lt_resnet32 --recipe_file x.json", ["two recipes; give one of them"]),
        ("--router true", ["a router is trained alone, after the experts", "--train_only router"]),
        ("--train_only classifiers --init_from x", ["set --batchformer none"]),
        ("--batchformer_window wide", ["'wide' is neither a whole number nor one of local, global"]),
        ("--batchformer_window 0", ["batchformer_window must be local, global or 1 or more, not 0"]),
        ("--num_experts 0", ["num_experts must be 1 or more, not 0"]),
        ("--depths 1 1", ["one entry for each stage"]),
        ("--num_workers -1", ["num_workers must be 0 or more"]),
        ("--recipe probe --depths 1 1", ["--depths 1 1 cannot act: it needs no --backbone"]),
        ("--recipe probe --groups 4", ["--groups 4 cannot act"]),
        ("--recipe probe --image_mean 0 0 0", ["--image_mean 0.0 0.0 0.0 cannot act: it needs no --backbone"]),
        ("--expert_adapter_size 8", ["--expert_adapter_size 8 cannot act: it needs --backbone"]),
        ("--recipe probe --feature_views 3", ["--feature_views 3 cannot act", "an --augmentation other than none"]),
        ("--recipe probe --classifier_init words", ["--classifier_init", "invalid choice: 'words'"]),
        (
            "--recipe probe --classifier_init text",
            ["as the backbone's pooler gives them", "set --backbone_pooling pooler --standardise_features false"],
        ),
        ("--recipe probe --prompt {}", ["--prompt {} cannot act: it needs --classifier_init text"]),
    ],
)
def test_a_mistake_on_the_command_line_is_explained(arguments, messages, capsys):
    with pytest.raises(SystemExit) as exit_info:
        parse_arguments(arguments.split())
    assert exit_info.value.code == 2
    output = capsys.readouterr().err
    for message in messages:
        assert message in output
    assert "Traceback" not in output


def test_help_says_what_every_option_means(capsys):
    with pytest.raises(SystemExit):
        parse_arguments(["--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert "images in a step, all processes and accumulated batches together; 1 or more (default: 32)" in shown
    assert "number of experts on the shared trunk or backbone; 1: an ordinary network (default: 3)" in shown


def test_help_has_every_option_under_a_heading_and_a_whole_sentence_for_it():
    for kind in (RunArguments, TrainingRecipe, NetworkOptions):
        for name, option in options_of(kind).items():
            assert option.group in _HEADINGS, name
            assert option.help == option.help.strip(" .,:;"), name
            assert option.help.count("(") == option.help.count(")"), name


def test_the_networks_options_are_those_of_its_configuration():
    """Names, types and defaults, which `--help` has without importing transformers.

    Two are no options: the backbone's own configuration comes with the backbone, the confidence is measured later.
    """
    options = inspect.get_annotations(RideBfConfig)
    for measured in ("backbone_config", "confidence"):
        del options[measured]
    assert inspect.get_annotations(NetworkOptions) == options
    assert {name: getattr(RideBfConfig, name) for name in NETWORK_DEFAULTS} == NETWORK_DEFAULTS
    assert RESIDUAL_OPTIONS == configuration_ride_bf.RESIDUAL_OPTIONS
    assert set(options_of(NetworkOptions)) == set(NETWORK_DEFAULTS) - {"num_channels"}


def test_what_the_command_line_gave_is_known():
    run, _ = parse_arguments(["--epochs", "3", "--num-experts=2", "--no_nesterov", "--data_dir", "none"])
    assert run.given == {"epochs", "num_experts", "nesterov", "data_dir"}
    assert RunArguments(seed=3).given == frozenset()
    assert RunArguments(seed=3).output_dir == f"outputs/{DEFAULT_RECIPE}"


def test_options_with_hyphens_and_flags_with_values():
    run, recipe = parse_arguments(["--router=false", "--nesterov", "false", "--dry-run", "--keep-last=3"])
    assert (recipe.nesterov, run.dry_run, run.keep_last, run.resume) == (False, True, 3, False)
    assert parse_arguments(["--recipe", "cifar100_lt_resnet32_ce", "--nesterov"])[1].nesterov


def test_a_printed_recipe_is_the_recipe(tmp_path):
    options = "--recipe cifar100_lt_resnet32 --num_experts 2 --depths 1 1 1 --reweight_epoch none --lr_steps 5"
    _, recipe = parse_arguments(options.split())
    (tmp_path / "mine.json").write_text(recipe.as_json())
    assert parse_arguments(["--recipe_file", str(tmp_path / "mine.json")])[1] == recipe
    assert recipe.differences(recipe.as_json()) == []


FORMER = {"diversity_temperature": 1.0, "distillation_loss_factor": 1.0, "router_positive_weight": 100.0}
FORMER |= {"margin_scale": 30.0}


@pytest.mark.parametrize("name", WITHOUT_BACKBONE)  # earlier versions had none
def test_recipes_of_earlier_versions_are_read(name, tmp_path):
    written = {**json.loads(RECIPES[name].as_json()), **FORMER}
    assert TrainingRecipe.from_json(written) == RECIPES[name]
    assert RECIPES[name].differences(json.dumps(written)) == [], "such a run can be resumed"


@pytest.mark.parametrize("option", FORMER)
def test_what_cannot_be_set_any_more_is_said(option, tmp_path, capsys):
    written = {**json.loads(RECIPES[DEFAULT_RECIPE].as_json()), **FORMER, option: 2.0}
    (tmp_path / "old.json").write_text(json.dumps(written))
    with pytest.raises(SystemExit):
        parse_arguments(["--recipe_file", str(tmp_path / "old.json")])
    assert f"{option} 2.0 of an earlier version cannot be set any more; here it is {FORMER[option]:g}" in (
        capsys.readouterr().err
    )
    assert RECIPES[DEFAULT_RECIPE].differences(json.dumps(written)) == [f"{option}: 2.0 -> {FORMER[option]}"]


def test_the_margins_have_the_scale_of_the_cosine():
    recipe = RECIPES[DEFAULT_RECIPE].with_overrides(cosine_scale=20.0)
    assert recipe.margin_scale == 20.0
    assert TrainingRecipe.from_json({**json.loads(recipe.as_json()), "margin_scale": 20.0}) == recipe
    with pytest.raises(ValueError, match=r"margin_scale 30.0 of an earlier version .* here it is 20"):
        TrainingRecipe.from_json({**json.loads(recipe.as_json()), "margin_scale": 30.0})
    assert RECIPES["cifar100_lt_resnet32_ce"].margin_scale == 30.0, "with a linear classifier too"


def test_a_recipe_names_what_its_network_does_not_have():
    with pytest.raises(ValueError, match=r"a network has no options \['width'\]; it has .*hidden_sizes"):
        RECIPES[DEFAULT_RECIPE].with_overrides(width=3)
    with pytest.raises(ValueError, match="num_channels must be 3"):
        RECIPES[DEFAULT_RECIPE].with_overrides(num_channels=1)


def test_differences_between_recipes():
    recipe = RECIPES["digits_lt_resnet32"]
    assert recipe.differences(recipe.as_json()) == []
    assert recipe.with_overrides(epochs=3).differences(recipe.as_json()) == ["epochs: 40 -> 3"]
    written = json.loads(recipe.as_json())
    del written["focal_gamma"], written["description"]  # as an earlier version would have written it
    assert recipe.differences(json.dumps(written)) == []
    assert replace(recipe, focal_gamma=2.0).differences(json.dumps(written)) == ["focal_gamma: 1.0 -> 2.0"]


def test_recipe_files_of_ours(tmp_path):
    path = tmp_path / "mine.json"
    path.write_text(RECIPES["imagenet_lt_resnet50"].with_overrides(epochs=7, num_experts=2).as_json())
    run, recipe = parse_arguments(["--recipe_file", str(path), "--batch_size", "8"])
    assert run.output_dir == "outputs/mine"
    assert (recipe.epochs, recipe.batch_size, recipe.lr_steps) == (7, 8, (60, 80))
    assert recipe.config(num_labels=10).num_experts == 2
    assert recipe.with_overrides(batch_size=400).differences(path.read_text()) == []


def test_recipe_files_of_the_authors():
    """Their CIFAR-100-LT configuration, as it lies beside the golden checkpoint, is our recipe."""
    path = ROOT / "tests" / "golden" / "authors_checkpoint" / "config.json"
    _, recipe = parse_arguments(["--recipe_file", str(path)])
    ours = RECIPES["cifar100_lt_resnet32"]
    assert [line for line in recipe.differences(ours.as_json()) if not line.startswith(("name:", "network:"))] == []
    ignored = {"transformers_version", "id2label", "label2id"}
    theirs, expected = recipe.config(num_labels=12).to_dict(), ours.config(num_labels=12).to_dict()
    assert {k: v for k, v in theirs.items() if k not in ignored} == {
        k: v for k, v in expected.items() if k not in ignored
    }


@pytest.mark.parametrize(
    ("entry", "value", "message"),
    [
        (("loss", "type"), "PaCoLoss", "loss 'PaCoLoss' is not one of RIDELoss"),
        (("loss", "args", "margin"), 1, r"arguments \['margin'\] of RIDELoss have no counterpart"),
        (("loss", "args", "s"), 20, "RIDELoss has s 20; here it is 30 and cannot be set"),
        (("arch", "args", "s"), 20, r"RIDELoss has s 30.0; here it is 20 and cannot be set"),
        (("loss", "args", "base_diversity_temperature"), 2.0, "has base_diversity_temperature 2.0; here it is 1 and"),
        (("loss", "args", "ride_loss_factor"), 0.5, "RIDELoss has ride_loss_factor 0.5; here it is 1 and cannot"),
        (("optimizer", "type"), "Adam", "optimizer 'Adam' is not SGD"),
        (("data_loader", "type"), "MyLoader", "data_loader 'MyLoader'"),
        (("lr_scheduler", "type"), "StepLR", "lr_scheduler 'StepLR'"),
        (("arch", "type"), "ViTModel", "the network 'ViTModel'"),
        (("trainer", "epochs"), 0, "epochs must be 1 or more"),
    ],
)
def test_entries_without_counterpart_are_named(entry, value, message, tmp_path, capsys):
    config = json.loads((ROOT / "tests" / "golden" / "authors_checkpoint" / "config.json").read_text())
    inner = config
    for key in entry[:-1]:
        inner = inner[key]
    inner[entry[-1]] = value
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(SystemExit):
        parse_arguments(["--recipe_file", str(tmp_path / "config.json")])
    assert re.search(message, capsys.readouterr().err)


def test_their_configurations_of_other_kinds(tmp_path):
    config = json.loads((ROOT / "tests" / "golden" / "authors_checkpoint" / "config.json").read_text())
    path = tmp_path / "config.json"

    def read(**changes):
        path.write_text(json.dumps({**config, **changes}))
        return parse_arguments(["--recipe_file", str(path)])[1]

    assert read(add_extra_info=False).loss == "cross_entropy"
    cosine = read(lr_scheduler={"type": "CosLR", "args": {"step1": 60, "step2": 80, "gamma": 0.1, "warmup_epoch": 5}})
    assert (cosine.schedule, cosine.warmup_epochs) == ("cosine", 5)
    constants = {"s": 30, "base_diversity_temperature": 1.0, "ride_loss_factor": 1.0}
    distilled = {
        **constants,
        "distill_temperature": 1.5,
        "reweight": True,
        "reweight_factor": 0.015,
        "reweight_epoch": 80,
    }
    recipe = read(loss={"type": "RIDELossWithDistill", "args": {**constants, **distilled}})
    assert (recipe.loss, recipe.distillation_temperature, recipe.distillation_factor) == ("ride", 1.5, 1.0)
    assert read(loss={"type": "CrossEntropyLoss", "args": {"reweight_CE": True}}).loss == "reweighted_cross_entropy"
    ldam = read(loss={"type": "LDAMLoss", "args": {"max_m": 0.5, "s": 30, "reweight_epoch": 160}})
    assert (ldam.loss, ldam.reweight_epoch) == ("ldam", 160)
    assert read(loss={"type": "FocalLoss", "args": {"gamma": 2.0}}).focal_gamma == 2.0
    inaturalist = read(data_loader={"type": "iNaturalistDataLoader", "args": {"batch_size": 512}})
    assert (inaturalist.dataset, inaturalist.batch_size) == ("inaturalist18", 512)
    assert inaturalist.batchformer_window == 512  # on their one GPU
    several = read(n_gpu=8, data_loader={"type": "ImageNetLTDataLoader", "args": {"batch_size": 250}})
    assert several.batchformer_window == 32  # 7 GPUs of 32 and one of 26


def test_their_ways_of_saying_never_and_together(tmp_path):
    config = json.loads((ROOT / "tests" / "golden" / "authors_checkpoint" / "config.json").read_text())
    config["loss"]["args"] = {"reweight": False, "additional_diversity_factor": 0}
    (tmp_path / "config.json").write_text(json.dumps(config))
    _, recipe = parse_arguments(["--recipe_file", str(tmp_path / "config.json")])
    assert (recipe.loss, recipe.reweight_epoch) == ("collaborative", None)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is no recipe"),
        ("{}", "missing options"),
        ('{"epoch": 3}', r"unknown options \['epoch'\]"),
        ('{"model_type": "ride_bf"}', "a model's configuration; the recipe is in the recipe.json"),
    ],
)
def test_broken_recipe_files(content, message, tmp_path, capsys):
    path = tmp_path / "broken.json"
    path.write_text(content)
    with pytest.raises(SystemExit):
        parse_arguments(["--recipe_file", str(path)])
    assert re.search(message, capsys.readouterr().err)


def test_none_can_be_asked_for():
    _, recipe = parse_arguments(["--reweight_epoch", "None", "--batchformer_layer_scale_init_value", "0"])
    assert recipe.reweight_epoch is None
    assert recipe.network["batchformer_layer_scale_init_value"] == 0.0
    run, recipe = parse_arguments(["--reweight_epoch", "7", "--batchformer_num_heads", "none", "--data_dir", "none"])
    assert (recipe.reweight_epoch, run.data_dir) == (7, None)


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("epochs", "two", "epochs must be a whole number, not 'two'"),
        ("epochs", True, "epochs must be a whole number, not True"),
        ("batchformer_window", "wide", "batchformer_window must be a whole number or one of local, global, not 'wide'"),
        ("batchformer_window", True, "batchformer_window must be .*, not True"),
        ("learning_rate", None, "learning_rate must be a number, not None"),
        ("loss", "mse", "no loss is called 'mse'; there are .*, ride"),
        ("dataset", "places", "no data set is called 'places'; there are .*, places_lt"),
        ("sampler", "even", "no sampler is called 'even'; there are instance, "),
        ("augmentation", "heavy", "no augmentation is called 'heavy'; there are imagenet, "),
        ("lr_steps", ["a"], "lr_steps must be a list, each item a whole number, not "),
        ("network", 3, "network must be .*, not 3"),
        ("network", {"width": 3}, r"a network has no options \['width'\]"),
    ],
)
def test_a_wrong_type_in_a_recipe_file_is_named(option, value, message, tmp_path, capsys):
    path = tmp_path / "wrong.json"
    path.write_text(json.dumps({**json.loads(RECIPES["digits_lt_resnet32"].as_json()), option: value}))
    with pytest.raises(SystemExit):
        parse_arguments(["--recipe_file", str(path)])
    assert re.search(message, capsys.readouterr().err)
