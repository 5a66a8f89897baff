"""A Gradio Space for a published model: `MODEL=user/name python app.py`. MODEL may be a folder of `ride_bf.publish`."""

import os
import sys
from pathlib import Path

try:
    import gradio as gr
except ModuleNotFoundError as missing:
    sys.exit(f"error: {missing.name} is missing; pip install -r requirements-extras.txt")
from huggingface_hub import metadata_load

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))  # needed if the working directory is another one; on a Space it is this one

import page  # noqa: E402
from predict import Model, NoPredictionError, load  # noqa: E402

_CACHE_SECONDS = 3600  # how long an uploaded image is kept


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
