"""Names the figures whose code has changed since they were measured: `python -m ride_bf.benchmark.stale`.

A results file of a benchmark has a digest of each source file that its numbers depend on. Comments, docstrings and
formatting do not count.
"""

import ast
import hashlib
import io
import json
import subprocess
import tarfile
import tempfile
from pathlib import Path
from typing import Any

_ROOT = Path(__file__).resolve().parent.parent.parent
_DOCS = _ROOT / "docs"
_NETWORK = ("configuration_ride_bf.py", "backbone_ride_bf.py", "modeling_ride_bf.py", "ride_bf/methods/**/*.py")
_IMAGES = (
    *("data/reading.py", "data/crops.py", "data/transforms.py", "data/augmentations.py", "data/batches.py"),
    "data/loaders.py",
)
_PARTS = (
    *("backbone", "batch_norm", "blocks", "ema", "features", "freezing", "heads", "loaders", "lora", "optimizer"),
    *("collapse", "running_statistics", "setup", "shared_weights", "start_weights", "text_start"),
)
_TRAINING = (
    *(*_NETWORK, *_IMAGES, "train_accelerate.py", "ride_bf/recipes/*.py", "ride_bf/evaluation/metrics.py"),
    *(f"ride_bf/training/{name}.py" for name in _PARTS),
)
_RUNS = (*_TRAINING, "ride_bf/benchmark/runs.py")
_DRAWINGS = ("data/custom.py", "ride_bf/benchmark/clipart_lists.py", "ride_bf/benchmark/efficientnet_lite0.py")
_CONFIDENCE = (
    "confidence_ride_bf.py",
    *(f"ride_bf/evaluation/{name}.py" for name in ("calibration", "confidence", "conformal", "unknown")),
)
# benchmark -> what its numbers depend on
SOURCES: dict[str, tuple[str, ...]] = {
    "clipart": (*_RUNS, *_DRAWINGS, "ride_bf/benchmark/clipart.py"),
    "collapse": (*_RUNS, *_DRAWINGS, "data/digits.py", "ride_bf/benchmark/collapse.py"),
    "confidence": (*_RUNS, *_DRAWINGS, "data/digits.py", *_CONFIDENCE, "ride_bf/benchmark/confidence.py"),
    "digits": (*_RUNS, "data/digits.py", "ride_bf/benchmark/digits.py"),
    "gpu": (*_TRAINING, *(f"ride_bf/benchmark/{name}.py" for name in ("gpu", "side_by_side", "train", "backbone"))),
    "input": (*_IMAGES, "data/prepare.py", "ride_bf/benchmark/input.py"),
    "lists": (
        *(f"data/{name}.py" for name in ("annotation_lists", "rows", "digest", "order", "groups")),
        *("ride_bf/methods/samplers.py", "ride_bf/benchmark/lists.py"),
    ),
    "scale": (*_NETWORK, "ride_bf/benchmark/scale.py"),
    "train": (*_NETWORK, "ride_bf/benchmark/train.py", "ride_bf/benchmark/backbone.py"),
}


def source_digests(benchmark: str, commit: str | None = None) -> dict[str, str]:
    """Path -> digest of each source file that the numbers of a benchmark depend on.

    Args:
        benchmark: a key of `SOURCES`.
        commit: of the files; by default they are read as they are now. Empty if this clone does not have the commit.
    """
    if commit is None:
        return _digests(_ROOT, benchmark)
    archive = subprocess.run(["git", "-C", str(_ROOT), "archive", commit, "*.py"], capture_output=True)
    if archive.returncode:
        return {}
    with tempfile.TemporaryDirectory() as folder, tarfile.open(fileobj=io.BytesIO(archive.stdout)) as files:
        files.extractall(folder, filter="data")
        return _digests(Path(folder), benchmark)


def _digests(root: Path, benchmark: str) -> dict[str, str]:
    paths = sorted({path for pattern in SOURCES[benchmark] for path in root.glob(pattern)})
    return {str(path.relative_to(root)): code_digest(path.read_text(encoding="utf-8")) for path in paths}


def code_digest(source: str) -> str:
    """A digest of what Python code does: without comments, docstrings and formatting."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None:
            node.body = node.body[1:]
    return hashlib.blake2b(_shape(tree).encode(), digest_size=8).hexdigest()


def _shape(node: object) -> str:
    """A syntax tree as text. What is empty is left out: versions of Python differ in which empty parts there are."""
    if isinstance(node, ast.JoinedStr):  # an f-string
        node.values = [part for part in node.values if not (isinstance(part, ast.Constant) and part.value == "")]
    if isinstance(node, ast.AST):
        fields = ((name, value) for name, value in ast.iter_fields(node) if value is not None and value != [])
        return f"{type(node).__name__}({', '.join(f'{name}={_shape(value)}' for name, value in fields)})"
    if isinstance(node, list):
        return f"[{', '.join(map(_shape, node))}]"
    return repr(node)


def changed_sources(results: Path) -> dict[str, list[str]] | None:
    """Source files that have changed since a results file was written, for each commit that its numbers are from.

    A commit without changes is left out. None if the file does not have digests.
    """
    content = json.loads(results.read_text(encoding="utf-8"))
    if "sources" not in content:
        return None
    sources = content["sources"]
    of_commits = sources if all(isinstance(own, dict) for own in sources.values()) else {content["commit"]: sources}
    now = source_digests(content["benchmark"])
    changed = {
        commit: sorted(path for path in before.keys() | now.keys() if before.get(path) != now.get(path))
        for commit, before in of_commits.items()
    }
    return {commit: paths for commit, paths in changed.items() if paths}


def has_modified_runs(content: Any) -> bool:
    """Whether some number in a results file is of code that differed from its commit."""
    if isinstance(content, dict):
        return content.get("modified") is True or any(map(has_modified_runs, content.values()))
    return isinstance(content, list) and any(map(has_modified_runs, content))


def main() -> None:
    for path in sorted(_DOCS.glob("*.json")):
        if has_modified_runs(json.loads(path.read_text(encoding="utf-8"))):
            print(f"{path.relative_to(_ROOT)} has runs of code that differed from their commit")
        changed = changed_sources(path)
        if changed is None:
            print(f"{path.relative_to(_ROOT)} was measured before digests of the code were kept")
            continue
        for commit, files in changed.items():
            measured = f"was measured at {(commit or 'an unknown commit')[:7]}"
            print(f"{path.relative_to(_ROOT)} {measured}, before these files changed: {', '.join(files)}")


if __name__ == "__main__":
    main()
