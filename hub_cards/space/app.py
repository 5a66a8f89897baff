"""A Gradio Space for a published model: `MODEL=user/name python app.py`, MODEL also a folder of `ride_bf.publish`."""

import os
import sys
from pathlib import Path

try:
    import gradio as gr
except ModuleNotFoundError as missing:
    sys.exit(f"error: {missing.name} is missing; pip install -r requirements-extras.txt")
from huggingface_hub import metadata_load

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))  # on a Space it is the working directory; run from elsewhere it is not

import page  # noqa: E402
from predict import Model, NoPredictionError, load  # noqa: E402

_CACHE_SECONDS = 3600  # how long an uploaded image is kept


def _file_as_sent(component: gr.Image, sent) -> str | None:
    if sent is None or sent.path is None:
        return None
    if not Path(sent.path).resolve().is_relative_to(Path(component.GRADIO_CACHE).resolve()):
        raise gr.Error("not an uploaded file")  # a path of this machine, sent by a program
    return sent.path


# gr.Image itself decodes the file, without limits, and keeps its errors from the page. Not in a subclass, for which
# Gradio writes a .pyi file beside this one, nor on an instance, which it makes anew when an example is chosen.
gr.Image.preprocess = _file_as_sent


def answer(model: Model, path: str | None) -> str:
    """The page's right side for an uploaded file; None where there is none."""
    if path is None:
        return page.nothing_yet()
    try:
        return page.result(model, model.predict(path))
    except NoPredictionError as error:
        return page.failure(str(error))


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
                    gr.Examples([[str(path)] for path in model.examples], image, cache_examples=False)
            with gr.Column(scale=3, min_width=320):
                shown = gr.HTML(page.nothing_yet(), elem_id="answer")
        image.change(lambda path: answer(model, path), image, shown, api_name="predict", show_progress="minimal")
    return blocks


def main() -> None:
    name = os.environ.get("MODEL") or metadata_load(HERE / "README.md")["models"][0]
    model = load(name)
    build(model).launch(
        max_file_size=model.handler.max_bytes,
        theme=gr.themes.Base(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]),
        css_paths=HERE / "style.css",
        footer_links=["api", "gradio"],
    )


if __name__ == "__main__":
    main()
