"""The house: what is where, what may import what, what travels to the Hub; and rules of style that a test can see."""

import ast
import subprocess
import sys
from textwrap import dedent

import pytest
from conftest import ROOT

import data

COMMANDS = sorted(path for path in ROOT.glob("ride_bf/*.py") if path.name != "__init__.py")
SOURCES = [*ROOT.glob("*.py"), *ROOT.glob("data/*.py"), *ROOT.glob("data/sets/*.py"), *ROOT.glob("ride_bf/**/*.py")]

# From the bottom to the top: a folder imports from those before it, and from itself. Losses and samplers know nothing
# of the recipes, whose options have their names.
ORDER = (
    "page_ride_bf",
    "confidence_ride_bf",
    "configuration_ride_bf",
    "backbone_ride_bf",
    "modeling_ride_bf",
    "data",
    "ride_bf.command_line",
    "ride_bf.methods.losses",
    "ride_bf.methods.samplers",
    "ride_bf.recipes",
    "ride_bf.reference",
    "ride_bf.runs",
    "ride_bf.methods",
    "ride_bf.evaluation",
    "ride_bf.hub",
    "ride_bf.training",
    "ride_bf.benchmark",
)
# What travels to the Hub with every model, in one flat folder.
TRAVELLING = ("page_ride_bf", "confidence_ride_bf", "configuration_ride_bf", "backbone_ride_bf", "modeling_ride_bf")
# A metric for the evaluate library, which copies it to a place of its own.
APART = ("ride_bf.shot_accuracy",)


def part_of(module):
    """The entry of ORDER that a module belongs to; for a command, and for what is not ours, None."""
    return next((part for part in (*ORDER, *APART) if module == part or module.startswith(f"{part}.")), None)


def module_of(path):
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imports_of(path):
    """Modules that a file imports, wherever in the file, but for annotations alone."""
    tree = ast.parse(path.read_text())
    annotations = {
        inner
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if node in annotations:
            continue
        relative = isinstance(node, ast.ImportFrom) and node.level > 0
        assert not relative or path.stem in TRAVELLING, f"{path}, line {node.lineno}: a relative import"
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_imports_a_command(path):
    commands = {module_of(command) for command in COMMANDS} | {"train_accelerate"}
    assert not commands & set(imports_of(path))


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_run_one_way(path):
    own = part_of(module_of(path))
    if own in ORDER:
        imported = {part for part in map(part_of, imports_of(path)) if part in ORDER}
        above = {part for part in imported if ORDER.index(part) > ORDER.index(own)}
        assert not above, f"{own} comes before {sorted(above)}"


@pytest.mark.parametrize("path", COMMANDS, ids=lambda path: path.stem)
def test_a_file_at_the_top_is_a_command(path):
    source = path.read_text()
    assert "def main(" in source
    assert source.rstrip().endswith('if __name__ == "__main__":\n    main()')
    assert len(source.splitlines()) <= 110, "a command parses, calls and prints; the rest belongs into a folder"


def test_the_training_command_is_read_in_one_sitting():
    assert len((ROOT / "train_accelerate.py").read_text().splitlines()) <= 300


@pytest.mark.parametrize("name", TRAVELLING)
def test_what_travels_to_the_hub_needs_only_torch_and_transformers(name):
    packages = {module.split(".")[0] for module in imports_of(ROOT / f"{name}.py")}
    of_transformers = {"huggingface_hub", "safetensors"}  # which it requires
    allowed = {"torch", "transformers", *of_transformers, *TRAVELLING} | sys.stdlib_module_names
    assert packages <= allowed


@pytest.mark.parametrize("name", TRAVELLING)
def test_the_files_that_travel_import_each_other_in_the_form_that_travels(name):
    """Relative in a folder of remote code, else absolute."""
    tree = ast.parse((ROOT / f"{name}.py").read_text())
    own = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module in TRAVELLING]
    tries = [node for node in tree.body if isinstance(node, ast.Try)]
    assert len(tries) == (1 if own else 0)
    for node in tries:
        relative, absolute = (list(map(ast.unparse, part)) for part in (node.body, node.handlers[0].body))
        assert [line.replace("from .", "from ") for line in relative] == absolute != relative
        assert ast.unparse(node.handlers[0].type) == "ImportError"
        assert len(own) == len(relative) + len(absolute)


def test_the_fixed_top_level():
    for name in (
        "configuration_ride_bf.py",
        "backbone_ride_bf.py",
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


HEAVY = {"torch", "torchvision", "transformers", "accelerate", "datasets", "pyarrow", "pandas", "matplotlib"}


def run_and_imported(*command):
    """What a fresh process prints, and the modules that it imports."""
    finished = subprocess.run(
        [sys.executable, "-X", "importtime", *command], cwd=ROOT, capture_output=True, text=True, check=True
    )
    lines = [line for line in finished.stderr.splitlines() if line.startswith("import time")]
    return finished.stdout, {line.rpartition("|")[2].strip() for line in lines}


@pytest.mark.parametrize(
    "command",
    [
        *(f"-m {module_of(path)}" for path in COMMANDS),
        "train_accelerate.py",
        "train_accelerate.py --recipe imagenet_lt_resnet50",
        "train_accelerate.py --recipe_file tests/golden/authors_checkpoint/config.json",
        "-m ride_bf.benchmark",
        "-m ride_bf.benchmark train",
        "-m data.synthesize",
    ],
)
def test_help_does_not_wait_for_torch(command):
    """What takes seconds to import is imported once the options are known to be right."""
    printed, imported = run_and_imported(*command.split(), "--help")
    assert not imported & HEAVY
    assert "usage:" in printed


@pytest.mark.parametrize("name", ["data", "ride_bf", "ride_bf.recipes", "ride_bf.methods.losses"])
def test_what_names_are_read_from_is_light(name):
    _, imported = run_and_imported("-c", f"import {name}; dir({name}) if {name!r} == 'data' else None")
    assert not imported & HEAVY


def test_the_fixed_names_lead_to_the_modules_that_have_them():
    program = """
        import sys
        import ride_bf
        assert "torch" not in sys.modules
        [getattr(module, "__file__", None) for module in list(sys.modules.values())]  # as inspect does
        assert "torch" not in sys.modules
        import ride_bf.losses, ride_bf.metrics
        from ride_bf.losses import RideLoss
        from ride_bf.metrics import shot_accuracy
        import ride_bf.evaluation.metrics
        import ride_bf.methods.losses
        assert RideLoss is ride_bf.methods.losses.RideLoss is ride_bf.losses.RideLoss
        assert shot_accuracy is ride_bf.evaluation.metrics.shot_accuracy is ride_bf.metrics.shot_accuracy
        try:
            from ride_bf.losses import NoLoss
        except ImportError:
            print("done")
    """
    finished = subprocess.run([sys.executable, "-c", dedent(program)], cwd=ROOT, capture_output=True, text=True)
    assert finished.stdout == "done\n", finished.stderr


def test_every_name_of_the_data_is_there():
    assert {name for name in data.__all__ if not hasattr(data, name)} == set()
    assert set(data.__all__) <= set(dir(data))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = data.nothing


def functions_of(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef):
            yield node


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_forward_returns_and_does_not_stash(path):
    for function in functions_of(path):
        if function.name == "forward":
            stashed = [
                ast.unparse(target)
                for node in ast.walk(function)
                if isinstance(node, ast.Assign | ast.AugAssign)
                for target in (node.targets if isinstance(node, ast.Assign) else [node.target])
                if ast.unparse(target).startswith("self.")
            ]
            assert not stashed, f"{path.name}, line {function.lineno}"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_buffers_not_devices(path):
    assert ".cuda(" not in path.read_text()


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_randomness_is_local(path):
    """No generator that the whole program shares, but torch's, which a run seeds for each of its batches."""
    called = {ast.unparse(node.func) for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)}
    local = ("np.random.default_rng", "np.random.RandomState", "np.random.SeedSequence", "np.random.Generator")
    local += ("random.Random(",)
    shared = {name for name in called if name.startswith(("np.random.", "random.")) and not name.startswith(local)}
    assert shared <= {"random.Random", "random.sample"}, shared


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_file_says_what_it_is(path):
    assert ast.get_docstring(ast.parse(path.read_text()))
