"""Every command that reads a model takes the output folder of a run and the folder of a checkpoint in it."""

import importlib
from pathlib import Path

import pytest
from tiny_run import write_run

COMMANDS = {  # command -> its arguments and the function whose first argument is or names the model
    "evaluate": (["--model", "{place}"], "ride_bf.runs.models.load_model"),
    "calibrate": (["{place}"], "ride_bf.runs.models.load_model"),
    "classify": (["{place}", "image.png"], "ride_bf.evaluation.classify.ImageClassifier"),
    "embed": (["{place}"], "ride_bf.runs.models.load_model"),
    "explain": (["{place}", "image.png"], "ride_bf.runs.models.load_model"),
    "route": (["{place}"], "ride_bf.runs.models.load_model"),
    "decouple": (["tau_normalisation", "{place}", "--output_dir", "{out}"], "ride_bf.runs.models.load_model"),
    "compare": (["{place}", "{place}"], "ride_bf.evaluation.comparison.read_results"),
    "convert_reference": (
        ["{place}", "--to_reference", "--output_dir", "{out}"],
        "ride_bf.reference.checkpoints.to_reference",
    ),
    "publish": (["{place}", "--repo_id", "user/name", "--dry_run"], "ride_bf.hub.export.export"),
    "profile": (["--recipe", "imagenet_lt_resnet50_router", "--results", "{place}"], "json.loads"),
}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = write_run(tmp_path_factory.mktemp("run"))
    (folder / "best" / "results.json").write_text("{}")
    return folder


class Reached(Exception):
    pass


def call(command, place, out):
    arguments, _ = COMMANDS[command]
    importlib.import_module(f"ride_bf.{command}").main([word.format(place=place, out=out) for word in arguments])


@pytest.mark.parametrize("named", ["run", "checkpoint"])
@pytest.mark.parametrize("command", COMMANDS)
def test_a_run_and_its_checkpoint_are_the_same_model(command, named, run, tmp_path, monkeypatch):
    def reached(model, *arguments, **options):
        raise Reached(model)

    if command == "publish":  # which reads a results.json too
        (run / "best" / "results.json").rename(tmp_path / "results.json")
    monkeypatch.setattr(COMMANDS[command][1], reached)
    try:
        with pytest.raises(Reached) as caught:
            call(command, run if named == "run" else run / "best", tmp_path / "out")
    finally:
        if command == "publish":
            (tmp_path / "results.json").rename(run / "best" / "results.json")
    (model,) = caught.value.args
    if command == "profile":
        assert model == (run / "test_results.json").read_text()
    else:
        assert Path(getattr(model, "checkpoint", model)) == run / "best"


@pytest.mark.parametrize("command", COMMANDS)
def test_a_folder_without_a_model(command, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(
        SystemExit, match=r"empty holds no model: there is no config\.json\. Name a run's output folder"
    ):
        call(command, tmp_path / "empty", tmp_path / "out")


@pytest.mark.parametrize("wrong", ["--batch_size=0", "--num_workers=-1"])
@pytest.mark.parametrize("command", ["calibrate", "decouple", "embed", "evaluate", "route"])
def test_numbers_of_a_loader_are_checked_before_anything_is_read(command, wrong, capsys):
    arguments = [word.format(place="/nowhere", out="out") for word in COMMANDS[command][0]]
    with pytest.raises(SystemExit):
        importlib.import_module(f"ride_bf.{command}").main([*arguments, wrong])
    assert "--batch_size must be 1 or more and --num_workers 0 or more, not" in capsys.readouterr().err
