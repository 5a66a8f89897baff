"""Every file imports only what the requirements that it comes with install."""

import ast
import functools
import sys
from importlib.metadata import distribution, packages_distributions

import pytest
from conftest import ROOT
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

TESTS = sorted(ROOT.glob("tests/*.py"))
SOURCES = [*ROOT.glob("*.py"), *ROOT.glob("data/**/*.py"), *ROOT.glob("ride_bf/**/*.py")]
OURS = {path.stem for path in (*ROOT.iterdir(), *TESTS)}
MODULES = packages_distributions()


@functools.cache
def installed_by(*files):
    """The distributions that `pip install -r` of these files brings, and theirs."""
    lines = (line.partition("#")[0].strip() for file in files for line in (ROOT / file).read_text().splitlines())
    wanted, brought = [Requirement(line) for line in lines if line], set()
    while wanted:
        requirement = wanted.pop()
        name = canonicalize_name(requirement.name)
        if name in brought or (requirement.marker and not requirement.marker.evaluate({"extra": ""})):
            continue
        brought.add(name)
        wanted += map(Requirement, distribution(name).requires or ())
    return brought


def imported_at_once(path):
    """The packages that a file imports when it is imported itself: not in a function, nor for annotations alone."""
    waiting = list(ast.parse(path.read_text()).body)
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield node.module.partition(".")[0]
        elif isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            waiting += node.orelse
        elif not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            waiting += ast.iter_child_nodes(node)


def foreign(path, *files):
    """The packages that a file imports at once and that these files do not install."""
    brought = installed_by(*files)
    packages = set(imported_at_once(path)) - OURS - sys.stdlib_module_names
    return {name for name in packages if not brought & set(map(canonicalize_name, MODULES.get(name, ())))}


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_sources_import_what_requirements_install(path):
    assert not foreign(path, "requirements.txt")


@pytest.mark.parametrize("path", TESTS, ids=lambda path: path.name)
def test_tests_import_what_make_install_installs(path):
    """Otherwise `make test` works after `make extras` alone."""
    assert not foreign(path, "requirements.txt", "requirements-dev.txt")


def test_what_is_imported_at_once(tmp_path):
    path = tmp_path / "module.py"
    path.write_text(
        "import os.path\nif TYPE_CHECKING:\n    import one\ntry:\n    from two.part import name\nexcept ImportError:\n"
        "    import three\ndef function():\n    import four\nclass Class:\n    import five\nfrom . import six\n"
    )
    assert set(imported_at_once(path)) == {"os", "two", "three", "five"}
    assert foreign(path, "requirements.txt") == {"two", "three", "five"}


@pytest.mark.parametrize("package", ["gradio", "onnxruntime", "playwright"])
def test_an_extra_is_foreign(package, tmp_path):
    path = tmp_path / "module.py"
    path.write_text(f"import {package}\nimport torch, PIL, sklearn\n")
    assert foreign(path, "requirements.txt", "requirements-dev.txt") == {package}
