"""Names the figures whose code has changed since they were measured: `python -m ride_bf.benchmark.stale`.

A results file of a benchmark has a digest of each source file that its numbers depend on. Comments, docstrings and
formatting do not count.
"""

import ast
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

_ROOT = Path(__file__).resolve().parent.parent.parent
_DOCS = _ROOT / "docs"
_NETWORK = ("configuration_ride_bf.py", "backbone_ride_bf.py", "modeling_ride_bf.py", "ride_bf/methods/**/*.py")
_IMAGES = (
    *("data/reading.py", "data/crops.py", "data/transforms.py", "data/augmentations.py", "data/batches.py"),
    "data/loaders.py",
)
_PARTS = ("backbone", "batch_norm", "blocks", "ema", "features", "freezing", "heads", "lora", "optimizer")
_TRAINING = (
    *(*_NETWORK, *_IMAGES, "train_accelerate.py", "ride_bf/recipes/*.py", "ride_bf/evaluation/metrics.py"),
    *(f"ride_bf/training/{name}.py" for name in _PARTS),
)
_CONFIDENCE = (
    "confidence_ride_bf.py",
    *(f"ride_bf/evaluation/{name}.py" for name in ("calibration", "confidence", "conformal", "unknown")),
)
# benchmark -> what its numbers depend on
SOURCES: dict[str, tuple[str, ...]] = {
    "clipart": (*_TRAINING, "ride_bf/benchmark/clipart*.py"),
    "collapse": (*_TRAINING, "ride_bf/benchmark/collapse.py"),
    "confidence": (*_TRAINING, *_CONFIDENCE, "ride_bf/benchmark/confidence.py", "ride_bf/benchmark/clipart_lists.py"),
    "digits": (*_TRAINING, "ride_bf/benchmark/digits.py"),
    "gpu": (*_TRAINING, *(f"ride_bf/benchmark/{name}.py" for name in ("gpu", "side_by_side", "train", "backbone"))),
    "input": (*_IMAGES, "data/prepare.py", "ride_bf/benchmark/input.py"),
    "lists": (
        *(f"data/{name}.py" for name in ("annotation_lists", "rows", "digest", "order", "groups")),
        *("ride_bf/methods/samplers.py", "ride_bf/benchmark/lists.py"),
    ),
    "scale": (*_NETWORK, "ride_bf/benchmark/scale.py"),
    "train": (*_NETWORK, "ride_bf/benchmark/train.py", "ride_bf/benchmark/backbone.py"),
}


def source_digests(benchmark: str) -> dict[str, str]:
    """Path -> digest of each source file that the numbers of a benchmark depend on."""
    paths = sorted({path for pattern in SOURCES[benchmark] for path in _ROOT.glob(pattern)})
    return {str(path.relative_to(_ROOT)): code_digest(path.read_text(encoding="utf-8")) for path in paths}


def code_digest(source: str) -> str:
    """A digest of what Python code does: without comments, docstrings and formatting."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None:
            node.body = node.body[1:]
    return hashlib.blake2b(ast.dump(tree).encode(), digest_size=8).hexdigest()


def changed_sources(results: Path) -> Sequence[str] | None:
    """Source files that have changed since a results file was written; None if the file does not have their digests."""
    content = json.loads(results.read_text(encoding="utf-8"))
    if "sources" not in content:
        return None
    before, now = content["sources"], source_digests(content["benchmark"])
    return sorted(path for path in before.keys() | now.keys() if before.get(path) != now.get(path))


def main() -> None:
    for path in sorted(_DOCS.glob("*.json")):
        changed = changed_sources(path)
        if changed is None:
            print(f"{path.relative_to(_ROOT)} was measured before digests of the code were kept")
        elif changed:
            print(f"{path.relative_to(_ROOT)} was measured before these files changed: {', '.join(changed)}")


if __name__ == "__main__":
    main()
