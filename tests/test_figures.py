"""Figures in README and docs say which code they are from."""

import ast
import json
import re
import subprocess

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


def named_commits(section):
    """The commits that follow the word: "commit `1234567`", "commits `1234567`, `89abcde` and `f012345`"."""
    lists = re.findall(r"commits?\s+(`[0-9a-f]{7}`(?:(?:,|\s+and)\s+`[0-9a-f]{7}`)*)", section)
    return set(re.findall(r"`([0-9a-f]{7})`", " ".join(lists)))


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.name)
def test_a_figure_whose_code_has_changed_names_its_commit(path):
    cited = sections_citing(path.name)
    assert cited, f"no page shows docs/{path.name}"
    changed = stale.changed_sources(path)
    if changed is None:  # the oldest files have no digests, and some no commit
        changed = {json.loads(path.read_text()).get("commit") or "": []}
    named = [named_commits(section) for section in cited]
    for commit in changed:
        assert any(commit[:7] in names if commit else names for names in named), commit
    if changed:
        for section, names in zip(cited, named, strict=True):
            assert names & {commit[:7] for commit in changed} or ("" in changed and names), section[:60]


def test_every_benchmark_has_sources():
    assert stale.SOURCES.keys() == BENCHMARKS.keys()
    for benchmark in BENCHMARKS:
        found = stale.source_digests(benchmark)
        assert all(any((ROOT / path).match(pattern) for path in found) for pattern in stale.SOURCES[benchmark])


def test_figures_of_recipes_depend_on_what_the_recipes_train():
    """`lora` and the learning rates of `finetune` by block are in files of their own."""
    assert {"ride_bf/training/lora.py", "ride_bf/training/blocks.py"} <= stale.source_digests("clipart").keys()


@pytest.mark.parametrize("name", ["clipart", "collapse", "confidence", "digits"])
def test_figures_of_runs_depend_on_how_they_start(name):
    starts = {f"ride_bf/training/{part}.py" for part in ("loaders", "setup", "shared_weights", "start_weights")}
    of_data = "data/custom.py" if name == "clipart" else "data/digits.py"
    assert {*starts, of_data, "ride_bf/benchmark/runs.py"} <= stale.source_digests(name).keys()


def test_only_what_code_does_counts():
    commented = '"""Doubles."""\n\n\ndef double(number):\n    """Doubles."""\n    return (2 * number)  # twice\n'
    assert stale.code_digest(commented) == stale.code_digest(CODE)
    assert stale.code_digest(CODE.replace("2", "3")) != stale.code_digest(CODE)


def test_the_digest_is_that_of_any_version_of_python():
    """Versions differ in which lists of a node may be empty, and in empty strings beside the parts of an f-string."""
    empty = ast.JoinedStr([ast.Constant("a"), ast.Constant("")])
    assert stale._shape(empty) == stale._shape(ast.JoinedStr([ast.Constant("a")]))
    call = ast.Call(ast.Name("f", ast.Load()), [], [])
    assert stale._shape(call) == "Call(func=Name(id='f', ctx=Load()))"
    del call.keywords
    assert stale._shape(call) == "Call(func=Name(id='f', ctx=Load()))"


def test_runs_of_modified_code_are_named(tmp_path, monkeypatch, capsys):
    (tmp_path / "docs").mkdir()
    monkeypatch.setattr(stale, "_ROOT", tmp_path)
    monkeypatch.setattr(stale, "_DOCS", tmp_path / "docs")
    for modified in (True, False):
        content = {"parts": {"frozen": {"runs": [{"commit": "abc"}, {"commit": "abc", "modified": modified}]}}}
        (tmp_path / "docs/clipart.json").write_text(json.dumps(content))
        stale.main()
        said = "docs/clipart.json has runs of code that differed from their commit" in capsys.readouterr().out
        assert said == modified


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
    printed = capsys.readouterr().out
    assert re.search(r"docs/lists.json was measured at \S+, before these files changed: double.py, new.py", printed)
    (tmp_path / "double.py").write_text(f"# twice\n{CODE}")
    (tmp_path / "new.py").unlink()
    assert stale.changed_sources(tmp_path / "docs/lists.json") == {}


def test_numbers_of_several_commits_are_judged_each_by_its_own(tmp_path, monkeypatch):
    def commit(number):
        (tmp_path / "double.py").write_text(CODE.replace("2", number))
        for words in (("add", "double.py"), ("commit", "-qm", number)):
            git(*words)
        return git("rev-parse", "HEAD")

    def git(*words):
        identity = ("-c", "user.name=a", "-c", "user.email=a@b.c", "-c", "commit.gpgsign=false")
        return subprocess.run(
            ["git", "-C", tmp_path, *identity, *words], check=True, capture_output=True, text=True
        ).stdout.strip()

    git("init", "-q")
    monkeypatch.setattr(stale, "_ROOT", tmp_path)
    monkeypatch.setitem(stale.SOURCES, "lists", ("*.py",))
    older, newer = commit("2"), commit("3")
    write_results(tmp_path / "lists.json", "lists", {}, [newer, older])
    assert stale.changed_sources(tmp_path / "lists.json") == {older: ["double.py"]}
    write_results(tmp_path / "outside.json", "lists", {}, [None])  # measured outside a git repository
    assert stale.changed_sources(tmp_path / "outside.json") == {}
    assert json.loads((tmp_path / "outside.json").read_text())["sources"] == stale.source_digests("lists")
    # a clone without the older commit keeps what was known of it
    known = json.loads((tmp_path / "lists.json").read_text())
    known["sources"]["0" * 40] = known["sources"].pop(older)
    write_results(tmp_path / "lists.json", "lists", known, [newer, "0" * 40])
    assert stale.changed_sources(tmp_path / "lists.json") == {"0" * 40: ["double.py"]}
