"""Makes the files that `python -m ride_bf.publish` uploads to the Hub."""

import json
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageOps

from configuration_ride_bf import RideBfConfig
from data import BrokenImageError, prepared_size
from modeling_ride_bf import RideBfForImageClassification
from ride_bf.evaluation.classify import ImageClassifier
from ride_bf.evaluation.compute import inference_cost, profile
from ride_bf.evaluation.html_report import write_report
from ride_bf.hub.card import Example, Published, make_card, write_plots
from ride_bf.hub.licences import Licence
from ride_bf.hub.neighbours import NEIGHBOURS, write_neighbours
from ride_bf.hub.run_files import SavedRun
from ride_bf.runs.checkpoints import FACTS
from ride_bf.runs.models import load_model, load_processor
from ride_bf.runs.provenance import DATA

HUB_CARDS = Path(__file__).resolve().parent.parent.parent / "hub_cards"
CLASS_COUNTS = "class_counts.json"
ONNX = "model.onnx"
TIMM = "timm>=1.0.22"  # what a model with a backbone of timm needs too
# Published code was tried on these versions. CLIP's tower gives NaN on 5.5, so backbones need those of this repository.
_TRANSFORMERS, _TRANSFORMERS_WITH_BACKBONE = "transformers>=5.4", "transformers>=5.17"
_SHOWN_PIXELS = 144  # the longer side of a small example on the card is at most this
# Example images in this repository, for models that were trained on that data set
_EXAMPLES = {"digits_lt": "examples/*.png"}
_TOP_K = 5  # number of answers for an example
_ANY_SIZE = 224  # of images for a network whose image processor does not give all images one size


def export(
    saved: SavedRun,
    folder: Path,
    repo_id: str,
    *,
    license: Licence | None = None,
    data_description: str | None = None,
    examples: Sequence[Path] = (),
    keep_batchformer: bool = False,
    onnx: bool = False,
    neighbours: Mapping[str, Any] | None = None,
) -> Published:
    """Fills the empty `folder` with the files of a model's page.

    These are weights, configuration, code and image processor; the card; results, report, recipe and plots, if there
    are any; the training data and the class counts; the handler for Inference Endpoints and its requirements; the
    licence of the code; and the image files `examples` with the model's answers. The BatchFormer is left out unless
    `keep_batchformer`, because it takes no part in predictions. No file contains a path of this machine. The same
    arguments give the same bytes. `license` is that of the weights; `data_description` says what the training images
    show. The files contain no training images, unless `neighbours`, the `data_options` of `write_neighbours`, are
    given: then it writes small copies of some.

    Returns what the card says about the files. Raises ValueError for examples that are not images, RuntimeError if the
    logits of the exported model differ from those of the checkpoint, ModuleNotFoundError, which says what to install,
    if `onnx` needs a missing package, and with `neighbours` the errors of `write_neighbours`.
    """
    model = load_model(saved.checkpoint, dtype="auto").eval()
    processor = load_processor(saved.checkpoint)
    images = _random_images(processor)
    exported = model
    if not keep_batchformer:
        exported = load_model(saved.checkpoint, dtype="auto", batchformer="none").eval()
    check_same_logits(model, exported, images)
    exported.save_pretrained(folder)
    processor.save_pretrained(folder)
    shown_images = None if neighbours is None else write_neighbours(saved.checkpoint, folder / NEIGHBOURS, **neighbours)
    if onnx:
        from ride_bf.hub.onnx import export_onnx

        export_onnx(exported, images, folder / ONNX)

    for path in (HUB_CARDS / "handler.py", HUB_CARDS.parent / "LICENSE"):
        shutil.copyfile(path, folder / path.name)
    requirements = _requirements(model.config)
    (folder / "requirements.txt").write_text(requirements, encoding="utf-8")
    contents: dict[str, Any] = {
        "recipe.json": saved.recipe,
        FACTS: saved.facts | ({DATA: saved.data.without_place().as_dict()} if saved.data else {}),
        CLASS_COUNTS: {"train": saved.train_class_counts} if saved.train_class_counts else None,
        saved.results_name: saved.results and {"model": repo_id, **saved.results},
    }
    for name, content in contents.items():
        if content:
            (folder / name).write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    if saved.is_evaluated:
        write_report(contents[saved.results_name], folder)
    shown = _classified_examples(folder, examples)
    parameters = sum(parameter.numel() for parameter in exported.parameters())
    left_out = sum(parameter.numel() for parameter in model.parameters()) - parameters
    plots = write_plots(saved, folder)
    size = prepared_size(processor)
    published = Published(
        repo_id=repo_id,
        license=license,
        parameters=parameters,
        parameters_left_out=left_out,
        data_description=data_description,
        image_size=size,
        multiply_adds=round(inference_cost(profile(exported.config, size[0], 1))) if _is_square(size) else None,
        examples=shown,
        plots=plots,
        onnx_size=tuple(images.shape[2:]) if onnx else None,
        oldest_transformers=_oldest("transformers", requirements),
        oldest_timm=_oldest("timm", requirements),
        neighbours=shown_images,
    )
    card = make_card(saved, published)
    card.save(folder / "README.md")
    return published


def _requirements(config: RideBfConfig) -> str:
    """What handler.py and the network's code need. Backbones need a newer transformers than the residual network."""
    content = (HUB_CARDS / "requirements.txt").read_text(encoding="utf-8")
    if config.backbone_config is None:
        return content
    content = content.replace(_TRANSFORMERS, _TRANSFORMERS_WITH_BACKBONE)
    return content + f"{TIMM}\n" * (config.backbone_config.model_type == "timm_wrapper")


def _oldest(package: str, requirements: str) -> str | None:
    """The oldest version of a package that the requirements allow; None if they do not name it."""
    found = re.search(rf"^{package}>=([\d.]+)", requirements, re.MULTILINE)
    return found and found[1]


def _is_square(size: tuple[int, int] | None) -> bool:
    return size is not None and size[0] == size[1]


@torch.no_grad()
def check_same_logits(
    model: RideBfForImageClassification, exported: RideBfForImageClassification, images: torch.Tensor
) -> None:
    """Raises RuntimeError unless both models give exactly the same logits for `images` (B, 3, height, width)."""
    before, after = (network(images.to(network.dtype)) for network in (model, exported))
    for name in ("logits", "expert_logits"):
        if not torch.equal(before[name].nan_to_num(), after[name].nan_to_num()):
            difference = (before[name] - after[name]).abs().nan_to_num().max().item()
            raise RuntimeError(
                f"the {name} of the exported model differ from the checkpoint's by {difference}; it was not exported"
            )


def _random_images(processor: Any) -> torch.Tensor:
    """Four random images (4, 3, height, width) of the processor's size, if it has one."""
    height, width = prepared_size(processor) or (_ANY_SIZE, _ANY_SIZE)
    return torch.randn(4, 3, height, width, generator=torch.Generator().manual_seed(0))


def _classified_examples(folder: Path, examples: Sequence[Path]) -> list[Example]:
    """Copies image files into `folder` and classifies them with the model there."""
    if not examples:
        return []
    repeated = sorted({path.name for path in examples if [other.name for other in examples].count(path.name) > 1})
    if repeated:
        raise ValueError(f"examples need different file names; there are several called {', '.join(repeated)}")
    (folder / "examples").mkdir()
    classify = ImageClassifier(folder)
    shown = []
    for path in examples:
        try:
            answers = classify(path, _TOP_K)
        except BrokenImageError as error:
            # an endpoint has the limits of training, so no option of this command makes it read the image
            raise ValueError(f"the example {error.problem}; name another with --examples") from error
        shutil.copyfile(path, folder / "examples" / path.name)
        picture = _enlarged(folder, f"examples/{path.name}")
        rounded = [{"label": answer["label"], "score": round(answer["score"], 6)} for answer in answers]
        shown.append(Example(f"examples/{path.name}", picture, rounded))
    return shown


def _enlarged(folder: Path, name: str) -> str:
    """Saves a small image in whole multiples of its pixels, so that one sees them. Returns the name of the picture."""
    with Image.open(folder / name) as image:
        factor = _SHOWN_PIXELS // max(image.size)
        if factor < 2:
            return name
        upright = ImageOps.exif_transpose(image).convert("RGBA")
    # in no folder of a folder: push_to_hub of transformers cannot upload these
    enlarged = f"shown/{Path(name).stem}.png"
    (folder / "shown").mkdir(exist_ok=True)
    ImageOps.scale(upright, factor, Image.Resampling.NEAREST).save(folder / enlarged)
    return enlarged


def default_examples(saved: SavedRun) -> list[Path]:
    """Example image files in this repository for the model's data set; empty for other data sets."""
    return sorted(HUB_CARDS.glob(_EXAMPLES[saved.dataset])) if saved.dataset in _EXAMPLES else []


def list_files(repository: str, folder: Path) -> str:
    """Lists the files in `folder` under the name of the repository that they are for, with their sizes in bytes."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    rows = (f"{path.stat().st_size:>12,}  {path.relative_to(folder)}" for path in paths)
    return "\n".join([f"Files of {repository}:", *rows])
