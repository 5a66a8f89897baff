"""What pages, messages and help texts name exists: options, files, headings and Python names."""

import ast
import contextlib
import functools
import importlib.util
import io
import re

import pytest
from accelerate.commands.launch import launch_command_parser
from conftest import ROOT
from torch.distributed.run import get_args_parser

from ride_bf.benchmark import __main__ as benchmark
from ride_bf.benchmark.arguments import BENCHMARKS
from ride_bf.training.arguments import parse_arguments

DOCS = [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))]
PAGES = [*DOCS, *sorted(ROOT.glob("hub_cards/**/*.md")), *sorted(ROOT.glob("configs/*"))]
SOURCES = [
    *ROOT.glob("*.py"),
    *(path for folder in ("data", "ride_bf", "hub_cards") for path in ROOT.glob(f"{folder}/**/*.py")),
]
OURS = {path.stem for path in SOURCES if path.parent == ROOT} | {"data", "ride_bf"}
# A dash follows none of ours: --no-skips is pytest's.
OPTION = re.compile(r"(?<![\w-])--(?:no_)?([a-z]\w*[a-z\d])(?![\w-])")
ELSEWHERE = {
    "SLURM": {"overlap", "requeue", "signal", "nodes", "gres", "time"},
    "the authors' code": {"add_bt", "reduce_dimension"},
    "git": {"porcelain"},
    "convmv": {"nfc", "nfd", "notest"},
    "a benchmark's own process": {"measure"},
}


def shown_by(parse, *arguments):
    """The options in the help of a command."""
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown), pytest.raises(SystemExit):
        parse([*arguments, "--help"])
    return set(OPTION.findall(shown.getvalue()))


@functools.cache
def options():
    """The names of all options: of our commands, and of the launchers."""
    found = shown_by(parse_arguments).union(*ELSEWHERE.values())
    for folder in ("ride_bf", "data"):
        for path in ROOT.glob(f"{folder}/*.py"):
            main = getattr(importlib.import_module(f"{folder}.{path.stem}"), "main", None)
            found |= shown_by(main) if main else set()
    for name in BENCHMARKS:
        found |= shown_by(benchmark.main, name)
    launchers = (launch_command_parser(), get_args_parser())
    return found | {name for parser in launchers for name in OPTION.findall(" ".join(parser._option_string_actions))}


def name_of(path):
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", PAGES, ids=name_of)
def test_options_of_a_page(path):
    assert set(OPTION.findall(path.read_text())) <= options()


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_options_that_messages_name(path):
    nodes = ast.walk(ast.parse(path.read_text()))
    texts = [node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    assert {name for text in texts for name in OPTION.findall(text)} <= options()


def anchor(heading):
    """The name that GitHub gives a heading in a link."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


def without_code(page):
    return re.sub(r"^```.*?^```", "", page, flags=re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("path", DOCS, ids=name_of)
def test_links(path):
    for link in re.findall(r"\]\(([^)\s]+)\)", without_code(path.read_text())):
        if re.match(r"https?://", link):
            continue
        file, _, heading = link.partition("#")
        target = path.parent / file if file else path
        assert target.exists(), link
        if heading:
            headings = re.findall(r"^#+ (.*)", without_code(target.read_text()), flags=re.MULTILINE)
            assert heading in map(anchor, headings), link


@pytest.mark.parametrize("path", DOCS, ids=name_of)
def test_python_of_a_page(path):
    """It is Python, and what it imports of ours is there."""
    for code in re.findall(r"^```python\n(.*?)^```", path.read_text(), flags=re.DOTALL | re.MULTILINE):
        for node in ast.walk(ast.parse(code)):
            if isinstance(node, ast.ImportFrom) and node.module.partition(".")[0] in OURS:
                module = importlib.import_module(node.module)
                assert all(hasattr(module, alias.name) for alias in node.names), ast.unparse(node)


@pytest.mark.parametrize("path", DOCS, ids=name_of)
def test_commands_of_a_page(path):
    """`python -m` of ours names a module that is there."""
    for module in re.findall(r"python -m ((?:ride_bf|data)[\w.]*)", path.read_text()):
        assert module == "ride_bf.NAME" or importlib.util.find_spec(module.rstrip(".")), module


@pytest.mark.parametrize(
    ("heading", "link"),
    [
        ("The size of the window", "the-size-of-the-window"),
        ("`--train_only`, *what* learns?", "--train_only-what-learns"),
    ],
)
def test_anchors(heading, link):
    assert anchor(heading) == link
