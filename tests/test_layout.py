"""The house: what may import what, and what travels to the Hub."""

import ast
import sys

import pytest
from conftest import ROOT

# every module of ours, and what of ours it may import
ALLOWED = {
    "configuration_ride_bf": set(),
    "modeling_ride_bf": {"configuration_ride_bf"},
    "data": set(),
    "ride_bf": set(),
    "ride_bf.losses": set(),
    "ride_bf.metrics": set(),
    "ride_bf.averaging": set(),
    "ride_bf.checkpoints": set(),
    "ride_bf.cost": {"modeling_ride_bf", "ride_bf.profile", "ride_bf.recipes"},
    "ride_bf.interruption": set(),
    "ride_bf.monitor": set(),
    "ride_bf.samplers": set(),
    "ride_bf.speed": {"ride_bf.recipes"},
    "ride_bf.windows": set(),
    "ride_bf.reference_config": {"configuration_ride_bf", "ride_bf.recipes"},
    "ride_bf.convert_reference": {
        "configuration_ride_bf",
        "modeling_ride_bf",
        "data",
        "ride_bf.recipes",
        "ride_bf.reference_config",
    },
    "ride_bf.check_data": {"data", "ride_bf.command_line", "ride_bf.metrics"},
    "ride_bf.classify": set(),
    "ride_bf.report": {"ride_bf.metrics"},
    "ride_bf.recipes": {"configuration_ride_bf"},
    "ride_bf.objectives": {"ride_bf.losses", "ride_bf.recipes"},
    "ride_bf.environment": set(),
    "ride_bf.run_folder": {"ride_bf.checkpoints", "ride_bf.environment", "ride_bf.monitor", "ride_bf.recipes"},
    "ride_bf.saved_run": {"configuration_ride_bf", "ride_bf.checkpoints", "ride_bf.results", "ride_bf.run_folder"},
    "ride_bf.model_card": {"ride_bf.metrics", "ride_bf.plots", "ride_bf.saved_run"},
    "ride_bf.onnx_export": {"modeling_ride_bf"},
    "ride_bf.export": {
        "modeling_ride_bf",
        "ride_bf.html_report",
        "ride_bf.model_card",
        "ride_bf.onnx_export",
        "ride_bf.saved_run",
    },
    "ride_bf.publish": {"ride_bf.command_line", "ride_bf.export", "ride_bf.saved_run"},
    "ride_bf.parts": {"modeling_ride_bf"},
    "ride_bf.results": {"data", "ride_bf.metrics"},
    "ride_bf.plots": {"ride_bf.metrics"},
    "ride_bf.html_report": {"ride_bf.metrics", "ride_bf.plots"},
    "ride_bf.evaluate": {
        "data",
        "ride_bf.command_line",
        "ride_bf.html_report",
        "ride_bf.parts",
        "ride_bf.report",
        "ride_bf.results",
    },
    "ride_bf.compare": {"ride_bf.command_line", "ride_bf.metrics", "ride_bf.results"},
    "ride_bf.shot_accuracy.shot_accuracy": {"ride_bf.metrics"},
    "ride_bf.command_line": {"configuration_ride_bf", "ride_bf.recipes", "ride_bf.reference_config"},
    "ride_bf.profile": {"configuration_ride_bf", "data", "modeling_ride_bf", "ride_bf.command_line"},
    "ride_bf.decouple": {
        "data",
        "modeling_ride_bf",
        "ride_bf.command_line",
        "ride_bf.evaluate",
        "ride_bf.losses",
        "ride_bf.metrics",
        "ride_bf.parts",
        "ride_bf.report",
    },
    "ride_bf.route": {
        "data",
        "modeling_ride_bf",
        "ride_bf.command_line",
        "ride_bf.metrics",
        "ride_bf.parts",
        "ride_bf.profile",
    },
    "ride_bf.benchmark": set(),
    "ride_bf.benchmark.__main__": {
        "ride_bf.benchmark",
        "ride_bf.benchmark.digits",
        "ride_bf.benchmark.input",
        "ride_bf.benchmark.lists",
        "ride_bf.benchmark.scale",
        "ride_bf.benchmark.train",
    },
    "ride_bf.benchmark.input": {"data", "ride_bf.benchmark.measure", "ride_bf.recipes"},
    "ride_bf.benchmark.lists": {"data", "ride_bf.benchmark.measure"},
    "ride_bf.benchmark.measure": set(),
    "ride_bf.benchmark.train": {
        "configuration_ride_bf",
        "data",
        "modeling_ride_bf",
        "ride_bf.benchmark.measure",
        "ride_bf.losses",
        "ride_bf.objectives",
        "ride_bf.profile",
        "ride_bf.recipes",
        "ride_bf.speed",
        "ride_bf.windows",
    },
    "ride_bf.benchmark.scale": {
        "data",
        "ride_bf.benchmark.measure",
        "ride_bf.benchmark.train",
        "ride_bf.recipes",
        "ride_bf.windows",
    },
    "ride_bf.benchmark.digits": {"data", "ride_bf.benchmark.measure", "ride_bf.command_line", "ride_bf.metrics"},
    "train_accelerate": {
        "data",
        "modeling_ride_bf",
        "ride_bf.averaging",
        "ride_bf.checkpoints",
        "ride_bf.command_line",
        "ride_bf.cost",
        "ride_bf.evaluate",
        "ride_bf.interruption",
        "ride_bf.monitor",
        "ride_bf.objectives",
        "ride_bf.parts",
        "ride_bf.publish",
        "ride_bf.recipes",
        "ride_bf.report",
        "ride_bf.run_folder",
        "ride_bf.samplers",
        "ride_bf.speed",
        "ride_bf.windows",
    },
}


def module_of(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    if parts[0] == "data":
        return "data"  # one module as far as the others are concerned
    return ".".join(parts).removesuffix(".__init__")


def imports_of(path):
    """Modules that a file imports, wherever in the file."""
    for node in ast.walk(ast.parse(path.read_text())):
        relative = isinstance(node, ast.ImportFrom) and node.level > 0
        assert not relative or path.name == "modeling_ride_bf.py", f"{path}, line {node.lineno}: a relative import"
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


SOURCES = [*ROOT.glob("*.py"), *ROOT.glob("ride_bf/**/*.py"), *ROOT.glob("data/*.py")]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_run_one_way(path):
    module = module_of(path)
    assert module in ALLOWED, f"{module} is new: say in ALLOWED what it may import"
    imported = {name for name in imports_of(path)}
    ours = {name for name in ALLOWED if name in imported and name != "ride_bf"}
    if any(name.split(".")[0] == "data" for name in imported):
        ours.add("data")
    assert ours - {module} <= ALLOWED[module]


@pytest.mark.parametrize("name", ["configuration_ride_bf", "modeling_ride_bf"])
def test_what_travels_to_the_hub_needs_only_torch_and_transformers(name):
    packages = {module.split(".")[0] for module in imports_of(ROOT / f"{name}.py")}
    allowed = {"torch", "transformers", "huggingface_hub", "configuration_ride_bf"} | sys.stdlib_module_names
    assert packages <= allowed


def test_the_configuration_import_is_the_form_that_travels():
    source = (ROOT / "modeling_ride_bf.py").read_text()
    assert (
        "try:\n    from .configuration_ride_bf import RideBfConfig\n"
        "except ImportError:\n    from configuration_ride_bf import RideBfConfig\n"
    ) in source


def test_the_fixed_top_level():
    for name in (
        "configuration_ride_bf.py",
        "modeling_ride_bf.py",
        "train_accelerate.py",
        "data",
        "ride_bf",
        "hub_cards",
        "tests",
        "requirements.txt",
        "README.md",
        "Makefile",
        "pyproject.toml",
        ".pre-commit-config.yaml",
        ".ci/run",
        "LICENSE",
    ):
        assert (ROOT / name).exists(), name
