"""Parts of which the tabs of the demo page are made: canvases, pictures, sampling options, errors."""

import hashlib
import io
import os
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from threading import Event

import torch
from PIL import Image

from pipelines.code_pictures import code_picture
from pipelines.demo import actions, canvas
from pipelines.demo.actions import Choices, Limits
from pipelines.files import atomic_file
from pipelines.two_stage import Pipeline

GREYS = ["#ffffff", "#c0c0c0", "#808080", "#404040", "#000000"]
COLOURS = [*GREYS, "#d62728", "#ff7f0e", "#f2c80f", "#2ca02c", "#17becf", "#1f77b4", "#9467bd", "#8c564b"]
MASK_COLOUR = "#ff2060"
# One computation at a time, whoever asks; not for other programs
MODEL = {"concurrency_id": "model", "concurrency_limit": 1, "api_visibility": "private"}
AT_ONCE = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}


class Parts:
    """What several tabs have, for one pipeline.

    Args:
        gradio: the module; importing it takes seconds, and only the page needs it.
        pipeline: what the page shows.
        limits: what one visitor may ask for.
        folder: from which Gradio serves files; it gets the pictures.
    """

    def __init__(self, gradio, pipeline: Pipeline, limits: Limits, folder: Path):
        self.gr, self.pipeline, self.limits, self.folder = gradio, pipeline, limits, folder
        self.tokenizer, self.why = pipeline.tokenizer, actions.refusals(pipeline)
        self.blank = self.canvas_file(torch.zeros(self.tokenizer.config.image_shape))

    @contextmanager
    def errors_in_page(self) -> Iterator[None]:
        try:
            yield
        except (ValueError, OSError) as error:
            raise self.gr.Error(str(error), print_exception=False) from None

    def file(self, picture: Image.Image) -> str:
        """A PNG, written once: Gradio would write an equal picture again, also while a browser reads the file."""
        stream = io.BytesIO()
        picture.save(stream, format="PNG")
        path = self.folder / hashlib.sha256(stream.getvalue()).hexdigest() / "image.png"
        if path.is_file():
            os.utime(path)  # Gradio deletes old files
        else:
            path.parent.mkdir(exist_ok=True)
            with atomic_file(path) as file:
                file.write(stream.getvalue())
        return str(path)

    def canvas_file(self, image: torch.Tensor) -> str:
        """An image (C, H, W) in [0, 1] as large as a canvas."""
        return self.file(canvas.on_canvas(image, self.tokenizer))

    def sheet_file(self, images: torch.Tensor | Sequence[torch.Tensor], columns: int | None = None) -> str:
        """Images (B, C, H, W) in [0, 1] beside and below each other."""
        return self.file(canvas.sheet(torch.stack([*images]), columns).picture)

    def picture(self, caption: str, **options):
        """A picture that is shown, its caption above it: Gradio's own labels cover what they name."""
        self.gr.Markdown(f"**{caption}**")
        options = {"type": "pil", "format": "png", "interactive": False, "elem_classes": "pixels",
                   "show_label": False, "buttons": ["download", "fullscreen"], **options}  # fmt: skip
        return self.gr.Image(label=caption, **options)

    def editor_column(self):
        """Of a fixed width: the canvas places its image by the width that it first sees."""
        return self.gr.Column(scale=0, min_width=canvas.canvas_size(self.tokenizer)[0] + 40)

    def editor(self, caption: str, elem_id: str, *, painting_mask: bool):
        """An image to draw on, with buttons that fill it; painting on it does not change it where it is a mask."""
        gr, (width, height) = self.gr, canvas.canvas_size(self.tokenizer)
        grey = self.tokenizer.config.image_shape[0] == 1
        colours = [MASK_COLOUR] if painting_mask else GREYS if grey else COLOURS
        stroke = max(1, (width + height) // (16 if painting_mask else 28))
        gr.Markdown(f"**{caption}**")
        editor = gr.ImageEditor(
            self.blank, label=caption, show_label=False, elem_id=elem_id, type="pil", image_mode="RGBA", format="png",
            sources=(), transforms=(), layers=False, buttons=[], canvas_size=(width, height), fixed_canvas=True,
            height=height + 80,
            brush=gr.Brush(default_size=stroke, colors=colours, default_color=colours[0], color_mode="fixed"),
            eraser=gr.Eraser(default_size=stroke),
        )  # fmt: skip
        editor.clear(lambda: self.blank, None, editor, **AT_ONCE)
        self.filling_buttons(editor, elem_id)
        return editor

    def fillable_picture(self, caption: str, elem_id: str):
        """An image that is not drawn on, as large as a canvas, with the same buttons."""
        picture = self.picture(caption, elem_id=elem_id, value=self.blank,
                               height=canvas.canvas_size(self.tokenizer)[1] + 80)  # fmt: skip
        self.filling_buttons(picture, elem_id)
        return picture

    def filling_buttons(self, component, elem_id: str) -> None:
        gr = self.gr
        with gr.Row():
            upload = gr.UploadButton(
                "Upload an image", file_types=["image"], size="sm", min_width=120, elem_id=f"{elem_id}-upload"
            )
            needs_caption = self.pipeline.prior.conditional_on_text and "unconditional" in self.why
            draw = gr.Button(
                "Sample one", size="sm", min_width=120, elem_id=f"{elem_id}-sample", interactive=not needs_caption
            )
        upload.upload(self.uploaded, upload, component, **MODEL)
        draw.click(self.one_sample, None, component, **MODEL)

    def uploaded(self, path: str) -> str:
        with self.errors_in_page():
            picture = canvas.open_upload(
                path, max_bytes=self.limits.max_upload_bytes, max_pixels=self.limits.max_pixels
            )
            return self.canvas_file(canvas.as_seen(picture, self.tokenizer))

    def one_sample(self) -> str:
        with self.errors_in_page():
            choices = Choices(seed=random.SystemRandom().randrange(2**31))
            frames = actions.sample(self.pipeline, 1, choices, limits=self.limits, stop=Event(), watch=False)
            return self.canvas_file(next(frames).images[0])

    def drawn(self, value: dict | None) -> torch.Tensor:
        """(C, H, W): what stands on a canvas, strokes included."""
        value = value or {"background": None, "layers": []}
        return canvas.from_canvas(value["background"], value["layers"], self.tokenizer)

    def drawn_picture(self, value: dict | None) -> str:
        return self.canvas_file(self.drawn(value))

    def background(self, value: dict | Image.Image | None) -> torch.Tensor:
        """(C, H, W): a picture, or what is under the strokes of a canvas."""
        picture = value["background"] if isinstance(value, dict) else value
        return canvas.from_canvas(picture, [], self.tokenizer)

    def mask(self, value: dict | None) -> torch.Tensor:
        return canvas.painted_mask(value["layers"] if value else [], self.tokenizer)

    def sampling_controls(self) -> list:
        """Controls in the order of the fields of `Choices`; those that this prior cannot honour say so."""
        gr, prior = self.gr, self.pipeline.prior
        most = max((k for k in prior.spec.vocab_sizes if k), default=1)

        def slider(name, label, low, high, value, step, meaning):
            why = self.why.get(name)
            info = meaning if why is None else f"Not here: {why}."
            return gr.Slider(low, high, value, step=step, label=label, info=info, interactive=why is None)

        schedule_why = self.why.get("guidance_schedule")
        return [
            self.condition_control(),
            slider("temperature", "Temperature", 0.05 if "cold" in self.why else 0, 2, 1, 0.05,
                   "Below 1: more probable, less varied."),
            slider("top_k", "Top-k", 0, most, 0, 1, "Only the k most probable codes; 0: all."),
            slider("top_p", "Top-p", 0.01, 1, 1, 0.01,
                   "Only the most probable codes that together have this probability; 1: all."),
            slider("min_p", "Min-p", 0, 1, 0, 0.01,
                   "Only codes with at least this share of the best one's probability; 0: all."),
            slider("guidance_scale", "Guidance scale", 0, 10, 1, 0.1, "Above 1: more like its class or caption."),
            gr.Radio(["constant", "linear"], value="constant", label="Guidance schedule", interactive=not schedule_why,
                     info=f"Not here: {schedule_why}." if schedule_why else "Linear: growing from 1 with each code."),
            gr.Number(0, label="Seed", precision=0, minimum=0, info="The same seed draws the same images."),
        ]  # fmt: skip

    def condition_control(self):
        gr, names = self.gr, actions.classes(self.pipeline)
        if self.pipeline.prior.conditional_on_text:
            needed = "A caption is needed." if "unconditional" in self.why else "Empty: drawn without a caption."
            return gr.Textbox("", label="Caption", info=needed, lines=1, max_length=500, elem_id="caption")
        if names:
            return gr.Dropdown(names, value=names[0], label="Class", info="What the images are to show.")
        info = "Not here: the prior is unconditional."
        return gr.Dropdown([actions.ANY_CLASS], value=actions.ANY_CLASS, label="Class", info=info, interactive=False)

    def code_pictures(self, elem_id: str, values: Sequence[str] = ()) -> list:
        """One for each level, elem_id-0, elem_id-1, ..."""
        spec = self.tokenizer.spec
        labels = []
        for level, (shape, vocab_size) in enumerate(zip(spec.shapes, spec.vocab_sizes)):
            kind = f"codes of {vocab_size}" if vocab_size else "real numbers"
            labels.append(f"{f'Level {level}: ' if spec.num_levels > 1 else ''}{' x '.join(map(str, shape))} {kind}")
        values = values or [None] * len(labels)
        return [
            self.picture(label, value=value, buttons=[], elem_id=f"{elem_id}-{level}")
            for level, (label, value) in enumerate(zip(labels, values))
        ]

    def draw_codes(self, codes, marked=None) -> list[str]:
        marks = [None] * len(codes) if marked is None else [level[0] for level in marked]
        sizes = self.tokenizer.spec.vocab_sizes
        return [self.file(code_picture(code[0], size, mark)) for code, size, mark in zip(codes, sizes, marks)]
