"""A Gradio Space for a published model: `MODEL=user/name python app.py`.

MODEL may be a folder of `ride_bf.publish`; REVISION is a branch or commit. Without MODEL, `model.json` names both.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

try:
    import gradio as gr
except ModuleNotFoundError as missing:
    sys.exit(f"error: {missing.name} is missing; pip install -r requirements-extras.txt")

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))  # needed if the working directory is another one; on a Space it is this one

import page  # noqa: E402
from predict import Model, Neighbour, NoModelError, NoPredictionError, Prediction, load  # noqa: E402

_CACHE_SECONDS = 3600  # how long an uploaded image is kept
# A screen reader announces what changes only in a region that was live before
_ANNOUNCE = "() => document.getElementById('answer')?.setAttribute('aria-live', 'polite')"


def _file_as_sent(component: gr.Image, sent) -> str | None:
    if sent is None or sent.path is None:
        return None
    if not Path(sent.path).resolve().is_relative_to(Path(component.GRADIO_CACHE).resolve()):
        raise gr.Error("not an uploaded file")  # a client sent a path of this machine
    return sent.path


# gr.Image would decode the file without limits and hide its errors from the page. The method is replaced on the class:
# for a subclass Gradio writes a .pyi file beside this one, and it makes a new instance when an example is chosen.
gr.Image.preprocess = _file_as_sent


def answer(model: Model, path: str | None) -> str:
    """The right side of the page for an uploaded file, or for None if there is no file."""
    if path is None:
        return page.nothing_yet()
    try:
        return page.result(model, model.predict(path))
    except NoPredictionError as error:
        return page.failure("No answer for this file", str(error))


def predict(model: Model, path: str | None) -> dict[str, Any]:
    """The answer of the API: the likeliest classes and each expert's vote."""
    if path is None:
        raise gr.Error("send an image file", print_exception=False)
    try:
        return as_json(model, model.predict(path))
    except NoPredictionError as error:
        raise gr.Error(str(error), print_exception=False) from error


def as_json(model: Model, prediction: Prediction) -> dict[str, Any]:
    return {
        "classes": [{"label": answer.name, "score": answer.probability} for answer in prediction.top],
        "experts": [
            None if vote is None else {"label": vote.name, "score": vote.probability} for vote in prediction.experts
        ],
        "group": model.group(prediction.top[0].label),
        **({} if prediction.in_set is None else {"set": [answer.name for answer in prediction.in_set]}),
        **({} if prediction.rejected is None else {"none_of_the_classes": prediction.rejected}),
        **({} if prediction.nearest is None else {"nearest_training_images": _as_json(prediction.nearest)}),
    }


def _as_json(images: list[Neighbour]) -> list[dict[str, Any]]:
    return [{"label": image.name, "similarity": image.similarity} for image in images]


def build(model: Model) -> gr.Blocks:
    with gr.Blocks(title=model.name, delete_cache=(_CACHE_SECONDS, _CACHE_SECONDS), analytics_enabled=False) as blocks:
        gr.HTML(page.header(model))
        with gr.Row():
            with gr.Column(scale=2, min_width=300):
                image = gr.Image(
                    sources=["upload", "webcam", "clipboard"],
                    label="Image",
                    height=320,
                    elem_id="image",
                )
                if model.examples:
                    gr.Examples(
                        [[str(path)] for path in model.examples],
                        image,
                        cache_examples=False,
                        example_labels=[path.stem.replace("_", " ") for path in model.examples],
                    )
            with gr.Column(scale=3, min_width=320):
                shown = gr.HTML(page.nothing_yet(), elem_id="answer")
        image.change(lambda path: answer(model, path), image, shown, api_visibility="private", show_progress="minimal")
        # the API's own answer: a button that nobody sees, because an endpoint needs an event
        gr.Button(visible=False).click(
            lambda path: predict(model, path), image, gr.JSON(visible=False), api_name="predict"
        )
    return blocks


def build_failure(message: str) -> gr.Blocks:
    """A page that says why there is no model."""
    with gr.Blocks(title="No model", analytics_enabled=False) as blocks:
        gr.HTML(page.failure("This page has no model", message))
    return blocks


def main() -> None:
    published = {"model": os.environ.get("MODEL"), "revision": os.environ.get("REVISION")}
    if published["model"] is None:
        published = json.loads((HERE / "model.json").read_text(encoding="utf-8"))
    try:
        model = load(**published)
    except NoModelError as error:
        print(f"error: {error}", file=sys.stderr)
        blocks, most_bytes = build_failure(str(error)), None
    else:
        blocks, most_bytes = build(model), model.handler.max_bytes
    blocks.launch(
        max_file_size=most_bytes,
        theme=gr.themes.Base(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]),
        css_paths=HERE / "style.css",
        js=_ANNOUNCE,
        footer_links=["api", "gradio"],
    )


if __name__ == "__main__":
    main()
