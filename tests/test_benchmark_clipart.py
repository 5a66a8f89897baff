"""The benchmark on drawings: its data, that no setting is chosen on the test images, and its tables."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image

from data import class_counts, load_long_tailed
from ride_bf.benchmark import clipart, collapse, digits
from ride_bf.benchmark.__main__ import main
from ride_bf.benchmark.arguments import CLIPART_PARTS
from ride_bf.benchmark.clipart import PARTS, Part
from ride_bf.benchmark.clipart_lists import draw_split, find_drawings, shrink, write_lists
from ride_bf.benchmark.paired import draw_windows, table
from ride_bf.benchmark.runs import Run, train_all
from ride_bf.training.arguments import parse_arguments

PART = Part(
    summary="two heads",
    options="--recipe probe",
    methods={"plain": "", "other": "--loss cross_entropy"},
    pairs={"other": ("plain",)},
    learning_rates=("0.01", "0.1"),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Classes of 30, 13 and 12 drawings, and what does not count."""
    place = tmp_path_factory.mktemp("drawings")
    generator = np.random.default_rng(0)

    def draw(path, pixels=None):
        (place / path).parent.mkdir(parents=True, exist_ok=True)
        pixels = generator.integers(0, 256, (6, 8, 3), dtype=np.uint8) if pixels is None else pixels
        Image.fromarray(pixels).save(place / path)

    for index in range(30):
        draw(f"animals/birds/{'deeper/' if index % 2 else ''}{index}.png")
    for index in range(13):
        draw(f"animals/{index}.png")
    for index in range(12):
        draw(f"food/fruit/{index}.png")
    for index in range(11):
        draw(f"food/few/{index}.png")
    for index in range(20):
        draw(f"unsorted/any/{index}.png")
    same = place / "animals/birds/0.png"
    for copy in ("animals/birds/copy.png", "food/fruit/zz_copy.png"):
        (place / copy).write_bytes(same.read_bytes())
    huge = bytearray(same.read_bytes())
    huge[16:24] = (20_000).to_bytes(4, "big") * 2
    (place / "food/fruit/huge.png").write_bytes(huge)
    (place / "food/fruit/empty.png").touch()
    return place


def test_drawings(folder):
    found = find_drawings(folder)
    assert {name: len(paths) for name, paths in found.items()} == {
        "animals/birds": 30,
        "animals/other": 13,
        "food/fruit": 12,
    }
    with pytest.raises(FileNotFoundError, match=r"has no drawings: apt-get install openclipart-png"):
        find_drawings(folder / "food/fruit/nothing")


def test_splits(folder):
    drawings = find_drawings(folder)
    first, again, other = (draw_split(drawings, seed) for seed in (0, 0, 1))
    assert first == again
    assert first["test"] != other["test"]
    assert [len(paths) for paths in first["test"].values()] == [10, 4, 4]
    assert [len(paths) for paths in first["tune_test"].values()] == [6, 4, 4]
    for name, paths in drawings.items():
        assert sorted(first["train"][name] + first["test"][name]) == paths
        assert sorted(first["tune_train"][name] + first["tune_test"][name]) == sorted(first["train"][name])


def test_lists_load(folder, tmp_path):
    drawn = draw_split(find_drawings(folder), 0)
    digest = write_lists(tmp_path, drawn["train"], drawn["test"])
    assert write_lists(tmp_path, drawn["train"], drawn["test"]) == digest
    splits = load_long_tailed("custom", folder, lists=tmp_path)
    assert splits["train"].features["label"].names == ["animals/birds", "animals/other", "food/fruit"]
    assert class_counts(splits["train"]) == [20, 9, 8]
    assert write_lists(tmp_path, drawn["test"], drawn["train"]) != digest


def test_small_copies(folder, tmp_path):
    drawings = find_drawings(folder)
    shrink(folder, drawings, tmp_path, 3)
    for paths in drawings.values():
        assert all(Image.open(tmp_path / path).size == (4, 3) for path in paths)


@pytest.fixture
def trained(monkeypatch):
    """Runs that only note what they would train on. The method "other" is better, most of all at 0.1."""
    noted = []

    def train(runs, jobs):
        noted.extend(runs)
        values = []
        for run in runs:
            words = dict(zip(run.options, run.options[1:], strict=False))
            value = 0.5 + 0.1 * ("--loss" in words) * (words["--learning_rate"] == "0.1") + 0.01 * int(words["--seed"])
            values.append(dict.fromkeys(("accuracy", *clipart.COLUMNS), value) | {"commit": "abc", "seconds": 1.0})
        return values

    monkeypatch.setattr(clipart, "train_all", train)
    monkeypatch.setitem(PARTS, "frozen", PART)
    return noted


def benchmark(folder, tmp_path, *options):
    where = ["--data_dir", folder, "--output_dir", tmp_path / "out", "--results", tmp_path / "results.json"]
    main([str(word) for word in ("clipart", "--backbone", "some/backbone", "--parts", "frozen", *where, *options)])
    return json.loads((tmp_path / "results.json").read_text())


def test_settings_are_chosen_on_training_images(folder, tmp_path, trained):
    results = benchmark(folder, tmp_path, "--splits", 0, 1, 2)
    measured = results["parts"]["frozen"]["methods"]
    assert [measured[method]["learning_rate"] for method in ("plain", "other")] == ["0.01", "0.1"]
    lists = [run.options[run.options.index("--lists") + 1] for run in trained]
    assert [path.endswith("/tune") for path in lists] == [True] * 4 + [False] * 6
    assert [run["split"] for run in measured["other"]["runs"]] == [0, 1, 2]
    assert results["lists"].keys() == {"0", "1", "2"}
    tested = (tmp_path / "out/lists/0/test.txt").read_text().splitlines()
    tuned = "".join((tmp_path / f"out/lists/0/tune/{name}.txt").read_text() for name in ("train", "test"))
    assert not [line for line in tested if line in tuned.splitlines()]


def test_with_other_rates_the_choice_is_made_again(folder, tmp_path, trained, monkeypatch):
    benchmark(folder, tmp_path, "--splits", 0, 1)
    trained.clear()
    monkeypatch.setitem(PARTS, "frozen", replace(PART, learning_rates=("0.01", "0.03")))
    measured = benchmark(folder, tmp_path, "--splits", 0, 1)["parts"]["frozen"]["methods"]
    assert [own["learning_rate"] for own in measured.values()] == ["0.01", "0.01"]
    assert [own["tuning"].keys() for own in measured.values()] == [{"0.01", "0.03"}] * 2
    # "plain" keeps its runs, and those of "other" had the rate 0.1
    assert [run.name for run in trained[4:]] == ["frozen: other, split 0", "frozen: other, split 1"]
    trained.clear()
    monkeypatch.setitem(PARTS, "frozen", replace(PART, learning_rates=("0.1",)))
    single = benchmark(folder, tmp_path, "--splits", 0)["parts"]["frozen"]["methods"]
    assert [(own["learning_rate"], "tuning" in own, len(own["runs"])) for own in single.values()] == [
        ("0.1", False, 1)
    ] * 2


def test_rates_are_tried_until_the_best_is_between_two(folder, tmp_path, trained, monkeypatch):
    monkeypatch.setitem(PARTS, "frozen", replace(PART, ladder=("0.001", "0.003", "0.01", "0.03", "0.1", "0.3", "1")))
    measured = benchmark(folder, tmp_path, "--splits", 0)["parts"]["frozen"]["methods"]
    # of equal accuracies the lowest rate counts as the best, and "plain" has the same at all rates
    assert [own["learning_rate"] for own in measured.values()] == ["0.001", "0.1"]
    assert list(measured["plain"]["tuning"]) == ["0.01", "0.1", "0.003", "0.03", "0.001"]
    assert list(measured["other"]["tuning"]) == ["0.01", "0.1", "0.03", "0.3"]
    trained.clear()
    benchmark(folder, tmp_path, "--splits", 0)
    assert not trained, "the choice stands"


def test_what_was_measured_is_not_measured_again(folder, tmp_path, trained, monkeypatch, capsys):
    first = benchmark(folder, tmp_path, "--splits", 0, 1)
    written = (tmp_path / "results.json").stat().st_mtime_ns
    trained.clear()
    benchmark(folder, tmp_path, "--splits", 0, 1)
    assert not trained
    assert "has all of 'frozen'; name another file by --results to measure it again" in capsys.readouterr().out
    assert (tmp_path / "results.json").stat().st_mtime_ns == written  # so it keeps the commit of the code that measured
    more = benchmark(folder, tmp_path, "--splits", 1, 2)
    assert [run.name for run in trained] == ["frozen: plain, split 2", "frozen: other, split 2"]
    assert [run["split"] for run in more["parts"]["frozen"]["methods"]["plain"]["runs"]] == [0, 1, 2]
    commands = [results["parts"]["frozen"]["command"] for results in (first, more)]
    assert [command.split("--splits ")[1] for command in commands] == ["0 1", "0 1 2"]
    trained.clear()
    row = benchmark(folder, tmp_path, "--splits", 3, "--methods", "other")["parts"]["frozen"]["methods"]
    assert [run.name for run in trained] == ["frozen: other, split 3"]
    assert {name: len(own["runs"]) for name, own in row.items()} == {"plain": 3, "other": 4}
    trained.clear()
    only = benchmark(folder, tmp_path, "--splits", 3, "--methods", "plain", "--parts", "frozen", "windows")["parts"]
    assert [run.name for run in trained] == ["frozen: plain, split 3"]
    assert only.keys() == {"frozen"}, "a part without the method is left alone"
    trained.clear()
    changed = {**PART.methods, "other": "--loss focal"}
    monkeypatch.setitem(PARTS, "frozen", Part(**{**vars(PART), "methods": changed}))
    benchmark(folder, tmp_path, "--splits", 0)
    assert {run.name.split(",")[0] for run in trained} == {"frozen: other"}
    assert sum(run.name == "frozen: other, split 0" for run in trained) == 1
    results = json.loads((tmp_path / "results.json").read_text())
    (tmp_path / "results.json").write_text(json.dumps(results | {"lists": {"0": "another"}}))
    with pytest.raises(SystemExit, match="is of other drawings or splits; name another file by --results"):
        benchmark(folder, tmp_path, "--splits", 0)


def test_the_table_marks_what_five_pairs_show(folder, tmp_path, trained, capsys):
    results = benchmark(folder, tmp_path, "--splits", 0, 1, 2, 3, 4)
    printed = capsys.readouterr().out
    assert "| plain | 52.0 ± 1.6 |" in printed
    assert "| **+10.0 ± 0.0** over plain | 5 of 5 |" in printed
    measured = results["parts"]["frozen"]
    for own in measured["methods"].values():
        own["runs"] = own["runs"][:4]
    assert "| +10.0 ± 0.0 over plain | 4 of 4 |" in table(PART, measured)
    main(["clipart", "--table_only", "--results", str(tmp_path / "results.json")])
    assert "| **+10.0 ± 0.0** over plain | 5 of 5 |" in capsys.readouterr().out
    main(["clipart", "--table_only", "--splits", "3", "4", "--results", str(tmp_path / "results.json")])
    assert "| +10.0 ± 0.0 over plain | 2 of 2 |" in capsys.readouterr().out
    with pytest.raises(SystemExit, match=r"has no runs of --splits \[9\]; it has those of \[0, 1, 2, 3, 4\]"):
        main(["clipart", "--table_only", "--splits", "3", "9", "--results", str(tmp_path / "results.json")])


def test_the_table_shows_macro_f1():
    """Older results have none."""
    runs = [{"split": split, **dict.fromkeys(clipart.COLUMNS, 0.5)} for split in (0, 1)]
    with_f1 = [run | {"macro_f1": 0.4 + 0.1 * run["split"]} for run in runs]
    rows = table(PART, {"methods": {"plain": {"runs": runs}, "other": {"runs": with_f1}}}).splitlines()
    assert [row.split(" | ")[5].strip() for row in rows[2:]] == ["–", "45.0 ± 7.1"]
    assert "macro F1" not in table(PART, {"methods": {"plain": {"runs": runs}}})


def test_a_difference_is_bold_if_a_t_test_finds_it():
    """Over five runs, 2.776 standard errors. Each run of "other" has its own difference."""
    for spread, shown in ((0.0079, "**+1.0 ± 0.4**"), (0.0082, "+1.0 ± 0.4")):
        gains = [0.01 + spread * place for place in (-1, -1, 0, 1, 1)]
        runs = {
            name: {"runs": [{"split": split, **dict.fromkeys(clipart.COLUMNS, value)} for split, value in own]}
            for name, own in {"plain": enumerate([0.5] * 5), "other": enumerate(0.5 + np.array(gains))}.items()
        }
        assert f"| {shown} over plain |" in table(PART, {"methods": runs})


def test_a_method_with_fewer_splits_says_so():
    numbers = {"plain": 3, "other": 3, "third": 2, "fourth": 1}
    runs = {
        name: {"runs": [{"split": split, **dict.fromkeys(clipart.COLUMNS, 0.5)} for split in range(number)]}
        for name, number in numbers.items()
    }
    rows = table(PART, {"methods": runs}).splitlines()[2:]
    assert [row.split(" | ")[0] for row in rows] == ["| plain", "| other", "| third (2 splits)", "| fourth (1 split)"]


def test_several_comparisons_stand_beside_each_other():
    methods = {
        name: {"runs": [{"split": 0, **dict.fromkeys(clipart.COLUMNS, value)}]}
        for name, value in {"plain": 0.5, "other": 0.6, "third": 0.4}.items()
    }
    part = replace(PART, methods=dict.fromkeys(methods, ""), pairs={"third": ("plain", "other", "not measured")})
    row = table(part, {"methods": methods}).splitlines()[-1]
    assert row.endswith("| -10.0 over plain; -20.0 over other | 0 of 1; 0 of 1 |")


def test_results_on_another_backbone_are_not_mixed(folder, tmp_path, trained):
    benchmark(folder, tmp_path, "--splits", 0)
    written = (tmp_path / "results.json").read_text()
    with pytest.raises(SystemExit, match="on the backbone 'some/backbone', not 'another/one'; name another file"):
        benchmark(folder, tmp_path, "--splits", 1, "--backbone", "another/one")
    assert (tmp_path / "results.json").read_text() == written


def test_other_drawings_are_trained_on_again(folder, tmp_path, trained):
    copied = tmp_path / "drawings"
    shutil.copytree(folder, copied)
    benchmark(copied, tmp_path, "--splits", 0)
    (copied / "animals/1.png").write_bytes((copied / "food/few/0.png").read_bytes())
    with pytest.raises(SystemExit, match="is of other drawings or splits; name another file by --results"):
        benchmark(copied, tmp_path, "--splits", 1)
    before = {run.name: run for run in trained}
    trained.clear()
    (tmp_path / "results.json").unlink()
    benchmark(copied, tmp_path, "--splits", 0)
    assert all(run.options == before[run.name].options and run.inputs != before[run.name].inputs for run in trained)


def test_small_copies_are_those_of_the_drawings(folder, tmp_path, trained, monkeypatch):
    """Training reads them from a folder that other drawings do not share."""
    monkeypatch.setitem(PARTS, "frozen", replace(PART, small=True, pretrained=False))
    copied = tmp_path / "drawings"
    shutil.copytree(folder, copied)
    for number in range(2):
        (copied / "animals/1.png").write_bytes((copied / f"food/few/{number}.png").read_bytes())
        benchmark(copied, tmp_path, "--splits", 0)
        (tmp_path / "results.json").unlink()
    places = dict.fromkeys(run.options[run.options.index("--data_dir") + 1] for run in trained)
    first, other = (Image.open(f"{place}/animals/1.png") for place in places)
    assert not np.array_equal(first, other)


def test_a_part_that_another_command_measures_meanwhile_stays(folder, tmp_path, trained, monkeypatch):
    train = clipart.train_all

    def train_beside(runs, jobs):
        other = {"benchmark": "clipart", "lists": {"7": "digest"}, "parts": {"windows": {"methods": {}}}}
        (tmp_path / "results.json").write_text(json.dumps(other))
        return train(runs, jobs)

    monkeypatch.setattr(clipart, "train_all", train_beside)
    results = benchmark(folder, tmp_path, "--splits", 0)
    assert list(results["parts"]) == ["windows", "frozen"]
    assert results["lists"].keys() == {"7", "0"}


def test_rows_of_other_options_are_not_kept(folder, tmp_path, trained, monkeypatch):
    benchmark(folder, tmp_path, "--splits", 0)
    monkeypatch.setitem(PARTS, "frozen", replace(PART, methods={**PART.methods, "other": "--loss focal"}))
    methods = benchmark(folder, tmp_path, "--splits", 1, "--methods", "plain")["parts"]["frozen"]["methods"]
    assert list(methods) == ["plain"]


def test_a_picture_lies_beside_its_results(tmp_path, capsys):
    in_docs = (ROOT / "docs/digits_lt.png").stat().st_mtime_ns
    shutil.copyfile(ROOT / "docs/digits_lt.json", tmp_path / "mine.json")
    main(["digits", "--plot_only", "--results", str(tmp_path / "mine.json")])
    assert (tmp_path / "digits_lt.png").is_file()
    assert (ROOT / "docs/digits_lt.png").stat().st_mtime_ns == in_docs


def test_results_of_another_benchmark_are_refused(tmp_path):
    for name in ("clipart", "collapse"):
        with pytest.raises(SystemExit, match=f"has results of the benchmark 'confidence', not of '{name}'; name anoth"):
            main([name, "--table_only", "--results", str(ROOT / "docs/confidence.json")])


def test_drawings_that_are_not_there_end_in_a_message(tmp_path):
    for name in ("clipart", "collapse", "confidence"):
        where = ("--data_dir", tmp_path / "none", "--output_dir", tmp_path / "out", "--results", tmp_path / "x.json")
        data = () if name == "clipart" else ("--data", "clipart")
        with pytest.raises(SystemExit, match="has no drawings: apt-get install openclipart-png"):
            main(list(map(str, (name, "--backbone", "some/backbone", *data, *where))))


def test_unknown_methods_and_missing_files_are_errors(folder, tmp_path, trained):
    with pytest.raises(SystemExit, match="no method of --parts is called 'plian'; there are\n  plain\n  other"):
        benchmark(folder, tmp_path, "--methods", "plian", "other")
    assert not trained
    for name in ("clipart", "collapse", "confidence"):
        with pytest.raises(SystemExit, match=r"nothing\.json is not there; measure first"):
            main([name, "--table_only", "--results", str(tmp_path / "nothing.json")])
    with pytest.raises(SystemExit, match=r"nothing\.json is not there; measure first"):
        main(["digits", "--plot_only", "--results", str(tmp_path / "nothing.json")])


def test_the_tables_in_the_docs_are_those_of_the_results():
    page = (ROOT / "docs/results.md").read_text()
    measured = json.loads((ROOT / "docs/clipart_lt.json").read_text())["parts"]
    assert measured
    for name, part in measured.items():
        assert table(PARTS[name], part) in page
    grids = json.loads((ROOT / "docs/collapse.json").read_text())["grids"]
    assert all(collapse.table(grid["cells"]) in page for grid in grids.values())


def test_the_rows_in_the_readme_are_those_of_the_results():
    readme = (ROOT / "README.md").read_text()
    rows = digits.digits_table(json.loads((ROOT / "docs/digits_lt.json").read_text())).split("\n\n")[0].splitlines()[2:]
    assert len(rows) >= len(digits.METHODS)
    assert [row for row in rows if row.split(" | ", 1)[1] not in readme] == []
    measured = json.loads((ROOT / "docs/clipart_lt.json").read_text())["parts"]
    of_drawings = "\n".join(table(PARTS[name], part) for name, part in measured.items())
    shown = readme[readme.index("## Results") : readme.index("From scratch, on `digits_lt`")].splitlines()
    numbers = [" | ".join(row.split(" | ")[1:5]) for row in shown if row.count(" ± ") >= 4]
    assert len(numbers) > 5
    assert [row for row in numbers if row not in of_drawings] == []


def test_parts():
    assert tuple(PARTS) == CLIPART_PARTS
    for part in PARTS.values():
        assert part.pairs.keys() | {other for others in part.pairs.values() for other in others} == part.methods.keys()


@pytest.mark.parametrize("name", [name for name in PARTS if name != "tuned"])
def test_the_commands_of_a_part_are_possible(name):
    part = PARTS[name]
    for method, own in part.methods.items():
        _, recipe = parse_arguments([*part.options.split(), *own.split(), "--learning_rate", part.learning_rates[0]])
        assert (recipe.network_value("batchformer") != "none") == ("BatchFormer" in method)


@pytest.mark.parametrize("name", collapse.DATA)
def test_the_commands_of_the_grid_are_possible(name):
    data = collapse.DATA[name]
    for cell in collapse.cells(data.forms):
        _, recipe = parse_arguments(cell.options(data).split())
        assert recipe.loss == "ride"
        assert recipe.batchformer_window == cell.window or cell.mode is None
        assert (cell.mixed_precision(data) == "bf16") == (name == "clipart" or "bfloat16" in cell.form)


def test_the_table_counts_what_collapsed():
    late = "paper, after warm-up"
    rounded = "paper, bfloat16"
    accuracies = {
        "paper": [0.2, 0.6, 0.4],
        "gated": [0.57, 0.58, 0.58],
        "none": [0.6, 0.61, 0.6],
        "none, bfloat16": [0.4, 0.4, 0.4],
        late: [0.6, 0.4, 0.6],
        rounded: [0.35, 0.31, 0.29],
    }
    grid = [
        {**vars(cell), "seeds": [0, 1, 2], "balanced_accuracy": accuracies[cell.form]}
        for cell in collapse.cells(("paper", late, "gated", rounded))
    ]
    rows = collapse.table(grid).splitlines()[2:]
    assert rows[0] == "| paper | insert | 18 of 27 | 18 of 27 | 0 of 9 | -20.3 | -20.3 ± 11.3 |"
    assert rows[3] == f"| {late} | insert | 4 of 12 | 8 of 12 | 0 of 4 | -7.0 | -7.0 ± 7.0 |"
    assert rows[4] == f"| {late} | shared_classifier, weight 1 | 4 of 12 | 8 of 12 | 0 of 4 | -7.0 | -7.0 ± 7.0 |"
    assert rows[6] == "| gated | shared_classifier, weight 0.1 | 0 of 27 | 18 of 27 | 9 of 9 | -2.7 | -2.7 ± 0.3 |"
    # beside RIDE alone in bfloat16
    assert rows[8] == f"| {rounded} | insert | 4 of 12 | 8 of 12 | 4 of 4 | -8.3 | -8.3 ± 1.8 |"


def test_runs_are_normal_commands(tmp_path, capsys):
    options = ("--epochs", "1", "--max_steps", "2", "--hidden_sizes", "4", "4", "4")
    runs = [
        Run(name=f"seed {seed}", options=(*options, "--seed", str(seed)), folder=tmp_path / str(seed))
        for seed in (0, 1)
    ]
    results = train_all(runs, jobs=2)
    for run, result in zip(runs, results, strict=True):
        tested = json.loads((run.folder / "test_results.json").read_text())
        assert tested["step"] == 2
        assert result["balanced_accuracy"] == tested["test"]["balanced_accuracy"]
        assert result["seconds"] > 0
    assert (runs[0].folder / "last/model.safetensors").is_file()
    bare = replace(runs[0], folder=tmp_path / "bare", keeps_model=False)
    assert train_all([bare], jobs=1)[0]["balanced_accuracy"] == results[0]["balanced_accuracy"]
    assert list(bare.folder.rglob("*.safetensors")) == []
    assert "1 finished run is reused" not in capsys.readouterr().out
    train_all([bare], jobs=1)
    assert f"1 finished run is reused; delete {bare.folder} to train again" in capsys.readouterr().out
    written = (tmp_path / "0/test_results.json").stat().st_mtime_ns
    impossible = Run(name="impossible", options=("--epochs", "1", "--data_dir", "nowhere"), folder=tmp_path / "2")
    never = replace(runs[0], name="never", folder=tmp_path / "3")
    with pytest.raises(ValueError, match="nowhere"):
        train_all([runs[0], impossible, impossible, impossible, never], jobs=1)
    assert not never.folder.exists(), "what waits is not started after an error"
    assert f"1 finished run is reused; delete {tmp_path / '0'} to train again" in capsys.readouterr().out
    assert (tmp_path / "0/test_results.json").stat().st_mtime_ns == written
    for other in ({"options": (*options, "--seed", "7")}, {"inputs": "a digest"}, {"mixed_precision": "bf16"}):
        train_all([replace(runs[0], **other)], jobs=1)
        assert (tmp_path / "0/test_results.json").stat().st_mtime_ns > written
        written = (tmp_path / "0/test_results.json").stat().st_mtime_ns


def test_a_rate_at_which_a_run_diverges_is_the_worst(tmp_path):
    options = ("--epochs", "1", "--max_steps", "4", "--hidden_sizes", "4", "4", "4", "--learning_rate", "1e20")
    diverges = Run(name="diverges", options=options, folder=tmp_path / "run", may_diverge=True)
    with pytest.raises(ValueError, match=r"the loss is (nan|inf)"):
        train_all([replace(diverges, may_diverge=False)], jobs=1)
    assert train_all([diverges], jobs=1)[0]["balanced_accuracy"] == 0.0
    assert train_all([diverges], jobs=1)[0]["balanced_accuracy"] == 0.0, "it is not trained again"


def test_the_picture_of_the_windows(tmp_path):
    names = [clipart._BEST_HEAD, *PARTS["windows"].methods]
    methods = {
        name: {"runs": [{"split": split, "balanced_accuracy": 0.5 + 0.01 * split} for split in (0, 1)]}
        for name in names
    }
    draw_windows(methods, clipart._BEST_HEAD, clipart._NAMES_ON_WINDOWS, tmp_path / "windows.png")
    assert Image.open(tmp_path / "windows.png").size == (660, 374)
