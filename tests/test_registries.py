"""A loss, a sampler, a data set, an augmentation: one file or entry, and options, `--help` and errors know its name."""

import json

import pytest
import torch

import ride_bf.methods.losses as losses
from data import DATA_SETS, DATASETS, NUM_CLASSES, find_entry, load_long_tailed, recognise, sets
from data.augmentations import AUGMENTATIONS, Augmentation
from data.sets import get_data_set, read_data_sets
from data.sets._benchmark import Benchmark
from ride_bf.methods.objectives import make_criterion
from ride_bf.methods.samplers import SAMPLERS, LongTailedSampler
from ride_bf.profile import main as profile
from ride_bf.recipes import RECIPES, TrainingRecipe
from ride_bf.training.arguments import parse_arguments

LOGITS, LABELS = torch.tensor([[[2.0, 1.0, 0.0]], [[0.0, 3.0, 1.0]]]), torch.tensor([0, 2])
OPTIONS = {"loss": "hinge", "sampler": "inverse", "dataset": "birds_lt", "augmentation": "plain"}


def a_loss(tmp_path, monkeypatch):
    folder = tmp_path / "losses"
    folder.mkdir()
    (folder / "hinge.py").write_text(
        "from ride_bf.methods.losses._shared import Criterion\n"
        "class HingeLoss(Criterion):\n"
        "    options = {'focal_gamma': 'margin'}\n"
        "    def __init__(self, class_counts, margin=1.0):\n"
        "        super().__init__()\n"
        "        self.classes, self.margin = len(class_counts), margin\n"
        "    def compute(self, expert_logits, labels, reweight):\n"
        "        return expert_logits.mean() * 0 + self.margin + self.classes\n"
    )
    monkeypatch.setattr(losses, "__path__", [*losses.__path__, str(folder)])


def a_sampler(tmp_path, monkeypatch):
    monkeypatch.setitem(SAMPLERS, "inverse", lambda counts, progress: (1 / counts) / (1 / counts).sum())


def a_data_set(tmp_path, monkeypatch):
    folder = tmp_path / "sets"
    folder.mkdir()
    (folder / "birds_lt.py").write_text(
        "from data.sets._benchmark import Benchmark\n"
        "DATA_SETS = (Benchmark(name='birds_lt', title='Birds-LT', num_classes=2, usual_place='data/birds',\n"
        "    lists={'train': 'birds_train.txt', 'test': 'birds_test.txt'}, images={'train': 3, 'test': 1},\n"
        "    most=2, least=1),)\n"
    )
    monkeypatch.setattr(sets, "__path__", [*sets.__path__, str(folder)])
    for name, data_set in read_data_sets().items():
        monkeypatch.setitem(DATA_SETS, name, data_set)


def an_augmentation(tmp_path, monkeypatch):
    monkeypatch.setitem(AUGMENTATIONS, "plain", Augmentation(lambda size: []))


NEW = {"loss": a_loss, "sampler": a_sampler, "dataset": a_data_set, "augmentation": an_augmentation}


@pytest.mark.parametrize("option", NEW)
def test_one_file_or_entry_makes_a_name_known(option, tmp_path, monkeypatch, capsys):
    def help_and_error():
        with pytest.raises(SystemExit):
            parse_arguments(["--help"])
        shown = " ".join(capsys.readouterr().out.split())
        with pytest.raises(SystemExit):
            parse_arguments([f"--{option}", "nothing"])
        with pytest.raises(ValueError, match="'nothing'") as refused:
            RECIPES["digits_lt_resnet32"].with_overrides(**{option: "nothing"})
        return shown.partition(f"--{option} {{")[2].partition("}")[0], capsys.readouterr().err, str(refused.value)

    name = OPTIONS[option]
    assert not any(name in words for words in help_and_error())
    NEW[option](tmp_path, monkeypatch)
    assert all(name in words for words in help_and_error())
    recipe = parse_arguments([f"--{option}", name])[1]
    assert getattr(recipe, option) == name
    assert TrainingRecipe.from_json(json.loads(recipe.as_json())) == recipe


def test_a_new_loss_is_made_and_its_options_are_its_own(tmp_path, monkeypatch, capsys):
    a_loss(tmp_path, monkeypatch)
    recipe = parse_arguments(["--loss", "hinge", "--focal_gamma", "2"])[1]
    assert make_criterion(recipe, [5, 3, 2])(LOGITS, LABELS) == 2 + 3
    with pytest.raises(SystemExit):
        parse_arguments(["--loss", "ride", "--focal_gamma", "2"])
    assert "--loss focal or hinge" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        parse_arguments(["--loss", "hinge", "--max_margin", "0.1"])
    assert "and this run has --loss hinge" in capsys.readouterr().err


def test_a_file_that_is_no_loss_is_named(tmp_path, monkeypatch):
    (tmp_path / "nothing_in_it.py").write_text("")
    monkeypatch.setattr(losses, "__path__", [*losses.__path__, str(tmp_path)])
    with pytest.raises(ValueError, match=r"nothing_in_it\.py must define one subclass of Criterion, not 0"):
        losses.loss_class("nothing_in_it")
    with pytest.raises(ValueError, match="no loss is called 'mse'; there are balanced_softmax, "):
        losses.loss_class("mse")


def test_a_new_sampler_draws(tmp_path, monkeypatch):
    a_sampler(tmp_path, monkeypatch)
    labels = torch.tensor([0] * 8 + [1] * 2).numpy()
    drawn = labels[list(LongTailedSampler(labels, 2, "inverse", 1000))]
    assert (drawn == 1).mean() == pytest.approx(0.8, abs=0.05)


def test_a_new_data_set_is_read_recognised_and_profiled(tmp_path, monkeypatch, capsys):
    from PIL import Image

    a_data_set(tmp_path, monkeypatch)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "birds"
    paths = ("wren/1.png", "wren/2.png", "tern/1.png", "tern/2.png")
    for path in paths:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(folder / path)
    (folder / "birds_train.txt").write_text("wren/1.png 0\nwren/2.png 0\ntern/1.png 1\n")
    (folder / "birds_test.txt").write_text("tern/2.png 1\n")
    assert recognise(folder) == "birds_lt"
    assert load_long_tailed("birds_lt", folder)["train"].features["label"].names == ["wren", "tern"]
    assert find_entry("birds_lt", folder, str(folder / "tern/1.png")) == f"{folder / 'birds_train.txt'}, line 3"
    with pytest.raises(FileNotFoundError, match=r"birds_lt needs the lists data/birds/birds_train.txt"):
        load_long_tailed("birds_lt")
    profile(["--dataset", "birds_lt"])
    assert "2 classes" in capsys.readouterr().out


def test_data_sets_say_what_they_are():
    assert set(DATASETS) == set(DATA_SETS)
    assert {name: DATA_SETS[name].num_classes for name in DATASETS if name != "custom"} == NUM_CLASSES
    assert get_data_set("places_lt").title == "Places-LT"
    assert isinstance(get_data_set("inaturalist18"), Benchmark)
    with pytest.raises(ValueError, match=r"no data set is called 'places'; there are cifar10_lt, .*, places_lt"):
        get_data_set("places")


def test_two_data_sets_of_one_name_are_refused(tmp_path, monkeypatch):
    a_data_set(tmp_path, monkeypatch)
    (tmp_path / "sets" / "other_birds.py").write_text("from data.sets.birds_lt import DATA_SETS\n")
    with pytest.raises(ValueError, match=r"two data sets are called 'birds_lt'; the second is in other_birds.py"):
        read_data_sets()


def test_a_place_is_refused_where_nothing_is_read_from_it():
    with pytest.raises(ValueError, match="digits_lt reads no files: data_dir 'nowhere' would do nothing"):
        load_long_tailed("digits_lt", "nowhere")
    assert find_entry("digits_lt", None, "x.png") is None
