"""An option that cannot act is an error: of the command line before anything is read, of the data once they are."""

from dataclasses import fields

import pytest
from test_training import train

from data.sets import DATA_SETS
from ride_bf.command_line.options import options_of
from ride_bf.methods.losses import loss_names, losses_that_read, options_read
from ride_bf.recipes import RECIPES, TrainingRecipe
from ride_bf.recipes.network_options import NetworkOptions
from ride_bf.training.arguments import RunArguments, parse_arguments
from ride_bf.training.effects import check_effect_of_options

ROUTER = "--recipe digits_lt_resnet32_router --init_from x"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            "--class_weight_beta 0.99",
            "--class_weight_beta 0.99 cannot act: it needs a loss that reads it, --loss reweighted_cross_entropy, and "
            "this run has --loss ride; leave it out or set --loss",
        ),
        ("--class_weight_beta 0.99 --loss ldam", "and this run has --loss ldam"),
        ("--focal_gamma 2", "--loss focal, and this run has --loss ride"),
        ("--diversity_factor -0.3 --loss ldam", "--loss ride, and this run has --loss ldam"),
        ("--logit_adjustment_tau 0.5 --loss balanced_softmax", "--loss expert_logit_adjusted or logit_adjusted, and"),
        ("--reweight_epoch 5 --loss focal", "--loss collaborative or ldam or ride, and this run has --loss focal"),
        ("--max_margin 0.3 --loss cross_entropy", "--max_margin 0.3 cannot act"),
        (
            "--diversity_factor -0.3 --num_experts 1",
            "it needs --num_experts 2 or more, and this run has --num",
        ),
        (
            "--reweight_factor 0.1 --reweight_epoch none",
            "it needs --reweight_epoch, and this run has no --rewe",
        ),
        ("--reweight_epoch 40", "it needs --epochs above that, and this run has --epochs 40"),
        ("--epochs 3 --reweight_epoch 3", "--reweight_epoch 3 cannot act"),
        ("--lr_steps 10", "--lr_steps 10 cannot act: it needs --schedule step, and this run has --schedule cosine"),
        ("--lr_gamma 0.5", "--lr_gamma 0.5 cannot act: it needs --schedule step"),
        ("--lr_gamma 0.5 --schedule step", "it needs --lr_steps, and this run has no --lr_steps"),
        ("--schedule step --lr_steps 10 50", "--lr_steps 10 50 cannot act: it needs --epochs above that"),
        ("--sampler_epoch largest_class", "a --sampler other than instance, and this run has --sampler instance"),
        (
            "--passes_per_epoch 2 --sampler class_balanced --sampler_epoch largest_class",
            "--passes_per_epoch 2 cannot act: it needs --sampler instance or --sampler_epoch images",
        ),
        ("--batchformer none --batchformer_dropout 0.1", "a --batchformer other than none"),
        ("--batchformer none --batchformer_window 8", "--batchformer_window 8 cannot act"),
        ("--batchformer insert --batchformer_loss_weight 0.5", "it needs --batchformer shared_classifier"),
        ("--router_top_k 3", "--router_top_k 3 cannot act: it needs --router, and this run has no --router"),
        ("--router_threshold 0.3", "--router_threshold 0.3 cannot act"),
        (
            "--classifier linear --cosine_scale 20 --loss focal",
            "it needs --classifier cosine or a loss with margins, and this run has --classifier linear and --loss",
        ),
        (
            "--recipe finetune --backbone x --train_only heads --feature_views 4 --teacher y",
            "--feature_views 4 cannot act: it needs no --teacher, and this run has --teacher y; leave it out or train "
            "without a teacher",
        ),
        (
            "--recipe finetune --backbone x --train_only heads --feature_views 4 --mixup_alpha 0.2",
            "and this run has --mixup_alpha 0.2 and --cutmix_alpha 0.0; leave it out or set both of these to 0",
        ),
        (
            "--freeze_batch_norm --init_from x --batchnorm synchronised",
            "this run has --freeze_batch_norm; leave it out or set --no_freeze_batch_norm",
        ),
        ("--groups 1", "--groups 1 cannot act: it needs --block_type bottleneck, and this run has --block_type basic"),
        ("--distillation_factor 2", "it needs --teacher, and this run has no --teacher; leave it out or set --teacher"),
        ("--recipe digits_lt_resnet32_distilled --distillation_temperature 2", "it needs --teacher"),
        (f"{ROUTER} --loss ldam", "a --train_only other than router, and this run has --train_only router"),
        (f"{ROUTER} --label_smoothing 0.1", "--label_smoothing 0.1 cannot act"),
        (
            "--allow_changes epochs",
            "--allow_changes epochs cannot act: it needs --resume, and this run has no",
        ),
        ("--push_every 3", "it needs --push_to_hub, and this run has no --push_to_hub"),
        ("--push_private", "--push_private cannot act: it needs --push_to_hub"),
        (
            "--dataset digits_lt --data_dir nowhere",
            "--data_dir nowhere cannot act: digits_lt reads no files; leave it out",
        ),
        (
            "--imbalance_factor 10",
            "--imbalance_factor 10.0 cannot act: it needs --dataset cifar10_lt or cifar100_lt, and this run has "
            "--dataset digits_lt; leave it out or set --dataset",
        ),
        (
            "--recipe imagenet_lt_resnet50 --image_column file",
            "--image_column file cannot act: it needs --dataset custom",
        ),
        ("--recipe cifar100_lt_resnet32 --streaming", "--streaming cannot act: it needs --dataset custom"),
    ],
)
def test_what_is_given_and_cannot_act_is_refused(arguments, message, capsys):
    with pytest.raises(SystemExit) as info:
        parse_arguments(arguments.split())
    assert info.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    "arguments",
    [
        "--recipe imagenet_lt_resnet50 --epochs 2",  # a published recipe, shortened: no step, no re-weighting
        "--recipe cifar100_lt_resnet32 --loss focal",  # what the recipe has for RIDE is not read any more
        "--recipe cifar100_lt_resnet32 --schedule cosine --batchformer none --num_experts 1",
        "--loss focal --focal_gamma 2 --reweight_epoch none --label_smoothing 0",
        "--loss ldam --max_margin 0.3 --reweight_epoch 39",
        "--imbalance_factor none --streaming false --teacher none",
        "--classifier linear --cosine_scale 20",  # which the margins of RIDE's loss have too
        "--data_dir x --image_size 448",  # with a backbone, its image processor resizes
        "--no_push_private --save_steps none",
        "--schedule step --lr_steps 39 --lr_gamma 0.5 --reweight_epoch 0 --reweight_factor 0.1",
        "--sampler class_balanced --sampler_epoch images --passes_per_epoch 2",
        "--teacher x --distillation_factor 2 --distillation_temperature 3",
        f"{ROUTER} --router_top_k 3 --router_threshold 0.2 --sampler_epoch largest_class",
        "--resume --allow_changes epochs --push_to_hub user/name --push_every 3 --push_private",
        "--dataset custom --data_dir place --image_column file --streaming",
        "--recipe cifar10_lt_resnet32 --imbalance_factor 10 --imbalance_type step --data_dir place",
        "--batchformer insert --batchformer_window 8 --batchformer_dropout 0.1 --batchformer_num_layers 2",
        "--block_type bottleneck --groups 4 --width_per_group 16 --classifier cosine --cosine_scale 20",
    ],
)
def test_what_acts_is_taken(arguments):
    parse_arguments(arguments.split())


def test_every_recipe_is_run_as_it_is():
    for name in RECIPES:
        parse_arguments(["--recipe", name])


def test_every_option_of_a_loss_is_read_by_one():
    """And a need names options that there are."""
    options = {**options_of(TrainingRecipe), **options_of(RunArguments), **options_of(NetworkOptions)}
    read = set().union(*map(options_read, loss_names())) - {"margin_scale"}
    assert read == {name for name, option in options.items() if option.group == "loss"} - {"loss"}
    assert losses_that_read("diversity_factor") == ["ride"]
    for name, option in options.items():
        for need in option.needs:
            assert set(need.options) <= set(options), name


def test_a_need_that_is_met_by_nothing_has_a_remedy_of_its_own():
    """To set the option, which is what is proposed otherwise, would be the wrong way round."""
    kinds = (TrainingRecipe, RunArguments, NetworkOptions)
    options = {name: option for kind in kinds for name, option in options_of(kind).items()}
    defaults = {field.name: field.default for kind in kinds for field in fields(kind)}
    needs = {need for option in options.values() for need in option.needs}
    nothing = [need for need in needs if all(options[name].asks_for_nothing(defaults[name]) for name in need.options)]
    reversed_ = [need for need in nothing if need.is_met(defaults)]
    assert len(reversed_) >= 3
    assert all(need.remedy for need in reversed_)


def test_an_object_is_checked_by_its_values_alone():
    """Nothing was given on a command line."""
    assert RunArguments(push_every=3).given == frozenset()
    with pytest.raises(ValueError, match="keep_last must be 1 or more, not 0"):
        RunArguments(keep_last=0)
    with pytest.raises(ValueError, match="output_dir is empty"):
        RunArguments(output_dir="")


@pytest.mark.parametrize("option", ["early_stopping_patience", "eval_steps"])
def test_without_a_validation_split_what_looks_at_it_is_refused(option):
    run = RunArguments(**{option: 3})
    check_effect_of_options(run, {"train": 1, "validation": 1, "test": 1})
    with pytest.raises(ValueError, match=f"--{option} 3 cannot act: these data have no validation split .*_fraction"):
        check_effect_of_options(run, ["train", "test"])
    check_effect_of_options(RunArguments(), ["train", "test"])
    streamed = RunArguments(**{option: 3}, dataset_options={"streaming": True})
    with pytest.raises(ValueError, match=r"add one to the stream, such as archives val-\*\.tar, or leave it out"):
        check_effect_of_options(streamed, ["train", "test"])


def test_a_run_without_validation_is_refused_before_it_is_begun(tmp_path, monkeypatch):
    load = DATA_SETS["digits_lt"].load

    def without_validation(self, place):
        splits = load(place)
        del splits["validation"]
        return splits

    monkeypatch.setattr(type(DATA_SETS["digits_lt"]), "load", without_validation)
    with pytest.raises(SystemExit, match="error: --early_stopping_patience 2 cannot act"):
        train(tmp_path / "out", "--early_stopping_patience", 2)
    assert not (tmp_path / "out/recipe.json").exists()
