"""Figures in README and docs say which code they are from."""

import json
import re

import pytest
from conftest import ROOT

from ride_bf.benchmark import stale
from ride_bf.benchmark.arguments import BENCHMARKS
from ride_bf.benchmark.measure import write_results

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
RESULTS = sorted((ROOT / "docs").glob("*.json"))
CODE = "def double(number):\n    return 2 * number\n"


def sections_citing(name):
    """The sections of all pages that name a results file."""
    sections = [section for page in PAGES for section in re.split(r"^#+ ", page.read_text(), flags=re.MULTILINE)]
    return [section for section in sections if f"docs/{name}" in section]


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.name)
def test_a_figure_whose_code_has_changed_names_its_commit(path):
    cited = sections_citing(path.name)
    assert cited, f"no page shows docs/{path.name}"
    if stale.changed_sources(path) == []:
        return
    commit = json.loads(path.read_text()).get("commit") or ""  # the oldest files have none
    for section in cited:
        assert re.search(rf"commit\s+`{commit[:7] or '[0-9a-f]{7}'}`", section), section[:60]


def test_every_benchmark_has_sources():
    assert stale.SOURCES.keys() == BENCHMARKS.keys()
    for benchmark in BENCHMARKS:
        found = stale.source_digests(benchmark)
        assert all(any((ROOT / path).match(pattern) for path in found) for pattern in stale.SOURCES[benchmark])


def test_figures_of_recipes_depend_on_what_the_recipes_train():
    """`lora` and the learning rates of `finetune` by block are in files of their own."""
    assert {"ride_bf/training/lora.py", "ride_bf/training/blocks.py"} <= stale.source_digests("clipart").keys()


def test_only_what_code_does_counts():
    commented = '"""Doubles."""\n\n\ndef double(number):\n    """Doubles."""\n    return (2 * number)  # twice\n'
    assert stale.code_digest(commented) == stale.code_digest(CODE)
    assert stale.code_digest(CODE.replace("2", "3")) != stale.code_digest(CODE)


def test_changed_files_are_named(tmp_path, monkeypatch, capsys):
    (tmp_path / "docs").mkdir()
    (tmp_path / "double.py").write_text(CODE)
    monkeypatch.setattr(stale, "_ROOT", tmp_path)
    monkeypatch.setattr(stale, "_DOCS", tmp_path / "docs")
    monkeypatch.setitem(stale.SOURCES, "lists", ("*.py",))
    write_results(tmp_path / "docs/lists.json", "lists", {"rows": []})
    (tmp_path / "docs/older.json").write_text("{}")
    stale.main()
    assert "older.json was measured before digests" in capsys.readouterr().out
    for name in ("double.py", "new.py"):
        (tmp_path / name).write_text("def double(number):\n    return number + number\n")
    stale.main()
    assert "docs/lists.json was measured before these files changed: double.py, new.py" in capsys.readouterr().out
    (tmp_path / "double.py").write_text(f"# twice\n{CODE}")
    (tmp_path / "new.py").unlink()
    assert stale.changed_sources(tmp_path / "docs/lists.json") == []
