"""Models to start from: classes go by their names, and a damaged file is one line."""

import json

import pytest
import torch
from conftest import tiny_config, tiny_model
from test_training import train
from transformers import ResNetConfig, ResNetForImageClassification

from data import evaluation_processor
from modeling_ride_bf import RideBfForImageClassification
from ride_bf.methods.teacher import load_teacher
from ride_bf.runs.models import load_model
from ride_bf.training.start_weights import initialise_from

PROCESSOR = evaluation_processor(8, 8, (0.5,) * 3, (0.5,) * 3)


def model_of(*names, seed=0, **options):
    labels = {"id2label": dict(enumerate(names)), "label2id": {name: label for label, name in enumerate(names)}}
    config = tiny_config(**{"num_labels": len(names), **labels, **options})
    torch.manual_seed(seed)
    return RideBfForImageClassification(config)


def rows_of(model, expert):
    return dict(model.classifiers[expert].named_parameters())


@pytest.mark.parametrize("classifier", ["cosine", "linear"])
def test_classes_are_found_by_their_names(tmp_path, classifier):
    there, here = ("ant", "bee", "cicada", "dragonfly"), ("dragonfly", "earwig", "ant", "flea", "bee")
    start = model_of(*there, classifier=classifier, seed=1)
    start.save_pretrained(tmp_path)
    model, before = (model_of(*here, classifier=classifier) for _ in range(2))
    started = initialise_from(model, tmp_path)
    for expert in range(3):
        for name, parameter in rows_of(model, expert).items():
            for label, class_name in enumerate(here):
                source, place = (start, there) if class_name in there else (before, here)
                assert torch.equal(parameter[label], rows_of(source, expert)[name][place.index(class_name)]), class_name
    assert torch.equal(model.ride_bf.trunk.stem[0].convolution.weight, start.ride_bf.trunk.stem[0].convolution.weight)
    assert (started.rule, started.copied, started.new) == ("name", 3, ["earwig", "flea"])
    assert str(started).endswith("3 of 5 classes were copied by their names; 2 start with new weights: earwig, flea")


def test_as_many_classes_by_other_names_are_other_classes(tmp_path):
    model_of("ant", "bee", "cicada", seed=1).save_pretrained(tmp_path)
    model = model_of("horse", "cow", "goat")
    before = model.classifiers[0].weight.clone()
    started = initialise_from(model, tmp_path)
    assert torch.equal(model.classifiers[0].weight, before)
    assert (started.copied, started.new) == (0, ["horse", "cow", "goat"])


def test_a_name_that_two_classes_share_tells_neither(tmp_path):
    model_of("crane", "crane", "bee", seed=1).save_pretrained(tmp_path)
    assert initialise_from(model_of("crane", "bee"), tmp_path).new == ["crane"]


def test_classes_without_names_go_by_their_place_if_there_are_as_many(tmp_path):
    start = tiny_model(num_labels=3)
    start.save_pretrained(tmp_path)
    model = model_of("ant", "bee", "cicada", seed=1)
    started = initialise_from(model, tmp_path)
    assert torch.equal(model.classifiers[2].weight, start.classifiers[2].weight)
    assert "3 of 3 classes were copied by their order, because its classes have no names" in str(started)
    more = model_of("ant", "bee", "cicada", "dragonfly")
    started = initialise_from(more, tmp_path)
    assert (started.rule, started.copied, len(started.new)) == ("none", 0, 4)


def test_new_classifiers_are_new_whatever_their_classes(tmp_path):
    model_of("ant", "bee", seed=1).save_pretrained(tmp_path)
    model = model_of("ant", "bee")
    before = model.classifiers[0].weight.clone()
    started = initialise_from(model, tmp_path, new_parts={"classifiers"})
    assert torch.equal(model.classifiers[0].weight, before)
    assert started.new == ["ant", "bee"]


def test_a_model_in_half_precision_can_be_started_from_and_evaluated(tmp_path):
    start = model_of("ant", "bee", seed=1).half()
    start.save_pretrained(tmp_path)
    model = model_of("ant", "bee")
    initialise_from(model, tmp_path)
    assert torch.equal(model.classifiers[0].weight, start.classifiers[0].weight.float())
    assert load_model(tmp_path).dtype == torch.float32


DIGITS = {"depths": [1, 1, 1], "hidden_sizes": [16, 24, 48]}


def test_a_run_says_which_classes_it_starts_with(tmp_path, capsys):
    model_of(*"9876543", "ten", batchformer="none", **DIGITS).save_pretrained(tmp_path / "other")
    options = ("--epochs", 1, "--max_steps", 1, "--batchformer", "none", "--init_from", tmp_path / "other")
    out = train(tmp_path / "out", *options)
    assert "7 of 10 classes were copied by their names; 3 start with new weights: 0, 1, 2" in capsys.readouterr().out
    train(tmp_path / "again", *options[:-1], out)  # a run's folder is that of its best checkpoint
    assert f"Started from {out}: 10 of 10 classes" in capsys.readouterr().out


@pytest.mark.parametrize("part", ["router", "class_scales"])
def test_what_is_not_trained_must_be_known(tmp_path, part):
    model_of(*"9876543210"[:9], "ten", classifier="linear", **DIGITS).save_pretrained(tmp_path / "other")
    options = ["--train_only", part, "--batchformer", "none", "--classifier", "linear"]
    options += ["--router", "true", "--router_top_k", "4"] if part == "router" else ["--loss", "cross_entropy"]
    with pytest.raises(
        SystemExit, match=f"error: train_only '{part}' needs a model that knows all .*same --class_names"
    ):
        train(tmp_path / "out", "--epochs", 1, "--init_from", tmp_path / "other", *options)


# Files that are no model


class Evil:
    def __reduce__(self):
        return (print, ("executed",))


def cut(path, keep):
    path.write_bytes(path.read_bytes()[:keep])


def as_pickle(folder, content=None):
    weights = RideBfForImageClassification.from_pretrained(folder).state_dict()
    (folder / "model.safetensors").unlink()
    torch.save(weights if content is None else content, folder / "pytorch_model.bin")
    return folder / "pytorch_model.bin"


def change_config(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


def other_kind(folder):
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], num_labels=2)
    ResNetForImageClassification(config).save_pretrained(folder)


DAMAGE = {
    "cut off": (lambda folder: cut(folder / "model.safetensors", -100), r"model\.safetensors .*cut off or damaged"),
    "a few bytes": (
        lambda folder: cut(folder / "model.safetensors", 50),
        r"model\.safetensors \(50 bytes\) is cut",
    ),
    "empty": (lambda folder: cut(folder / "model.safetensors", 0), r"model\.safetensors \(0 bytes\) is cut off"),
    "a pointer": (
        lambda folder: (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n"),
        r"model\.safetensors is a Git LFS pointer",
    ),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "no file named model.safetensors"),
    "pickle cut off": (lambda folder: cut(as_pickle(folder), -200), r"pytorch_model\.bin .*cut off or damaged"),
    "pickle cut early": (lambda folder: cut(as_pickle(folder), 100), r"pytorch_model\.bin .*cut off or damaged"),
    "pickle empty": (lambda folder: cut(as_pickle(folder), 0), r"pytorch_model\.bin \(0 bytes\) is cut off"),
    "no pickle": (lambda folder: as_pickle(folder).write_bytes(b"hello world"), r"pytorch_model\.bin .*damaged"),
    "a pickle that executes": (
        lambda folder: as_pickle(folder, {"x": Evil()}),
        r"pytorch_model\.bin .*other than weights",
    ),
    "another shape": (
        lambda folder: change_config(folder, hidden_sizes=[4, 16]),
        "weights and config.json are of different networks: .*have another shape",
    ),
    "weights that are missing": (
        lambda folder: change_config(folder, depths=[1, 3]),
        "weights and config.json are of different networks: .*are missing, such as ",
    ),
    "a config that is damaged": (lambda folder: cut(folder / "config.json", 20), "config.*not a valid JSON"),
    "an impossible config": (lambda folder: change_config(folder, num_experts=0), "num_experts must be 1 or more"),
    "no config": (lambda folder: (folder / "config.json").unlink(), "holds no model: there is no config.json"),
}
OURS = {
    "another kind": (other_kind, "its config.json is of a resnet model, not of a ride_bf"),
    "weights that are left over": (lambda folder: change_config(folder, depths=[1, 1]), "are left over"),
    "a config of nothing": (lambda folder: (folder / "config.json").write_text("[]"), "is of a nameless model"),
}


def check_message(error, folder, message):
    assert error.match(message)
    assert str(folder) in str(error.value)
    assert "\n" not in str(error.value)
    assert "\x1b" not in str(error.value)


@pytest.mark.parametrize("damage", [*DAMAGE, *OURS])
def test_a_model_that_cannot_be_loaded_is_one_line(tmp_path, damage, capsys):
    model_of("ant", "bee").save_pretrained(tmp_path)
    break_it, message = {**DAMAGE, **OURS}[damage]
    break_it(tmp_path)
    with pytest.raises(ValueError) as error:  # noqa: PT011 (the message is compared below)
        initialise_from(model_of("ant", "bee"), tmp_path)
    check_message(error, tmp_path, message)
    assert "executed" not in capsys.readouterr().out


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_teacher_that_cannot_be_loaded_is_one_line(tmp_path, damage):
    model_of("ant", "bee").save_pretrained(tmp_path)
    PROCESSOR.save_pretrained(tmp_path)
    break_it, message = DAMAGE[damage]
    break_it(tmp_path)
    with pytest.raises(ValueError) as error:  # noqa: PT011 (the message is compared below)
        load_teacher(tmp_path, ["ant", "bee"], PROCESSOR)
    check_message(error, tmp_path, message)


@pytest.mark.parametrize("option", ["--init_from", "--teacher"])
def test_a_run_ends_with_that_line(tmp_path, option):
    folder = tmp_path / "other"
    model_of(*"0123456789", **DIGITS).save_pretrained(folder)
    PROCESSOR.save_pretrained(folder)
    cut(folder / "model.safetensors", -100)
    message = (
        rf"^error: {folder} cannot be loaded: model\.safetensors \(.* bytes\) is cut off or damaged .*Copy it again"
    )
    with pytest.raises(SystemExit, match=message):
        train(tmp_path / "out", "--epochs", 1, "--batchformer", "none", option, folder)


def test_a_checkpoint_of_a_run_says_how_much_of_a_file_there_is(tmp_path):
    out = train(tmp_path / "out", "--epochs", 1, "--max_steps", 1)
    cut(out / "last/model.safetensors", 1000)
    with pytest.raises(ValueError, match=r"model\.safetensors has 1000 bytes of \d+"):
        load_model(out / "last")


def test_pickles_are_read_as_weights_alone(tmp_path):
    model_of("ant", "bee").save_pretrained(tmp_path)
    as_pickle(tmp_path)
    expected = model_of("ant", "bee").state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in load_model(tmp_path).state_dict().items())
