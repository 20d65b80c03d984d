"""The demo page: controls, pictures and how they hang together. What they do is in `actions`.

What this pipeline cannot honour is disabled and says why. Whatever goes wrong by a person's choice is told in the page.
"""

import random
import time
from pathlib import Path
from threading import Event

import torch

from pipelines.demo import actions, canvas
from pipelines.demo.actions import Choices, Limits
from pipelines.demo.parts import AT_ONCE, MODEL, Parts
from pipelines.two_stage import Pipeline

CSS = """
.gradio-container {width: 100%; max-width: 1280px !important; margin: auto}
.pixels img {image-rendering: pixelated}
/* the palette has the colour that is chosen: white on white */
.toolbar-wrap button svg {filter: drop-shadow(0 0 1px grey)}
#completions .grid-wrap {max-height: none; overflow: visible}
#completions .grid-container {grid-template-columns: repeat(auto-fill, minmax(130px, 1fr)) !important}
@media (max-width: 480px) {
    .tab-container button {padding: 0 8px !important}
    #sample-row {flex-direction: column-reverse}
}
"""


def build_page(gradio, pipeline: Pipeline, limits: Limits, name: str, folder: Path):
    """The page as `gradio.Blocks`, not launched yet; `name` is the pipeline's, for people. `folder`: see `Parts`."""
    with gradio.Blocks(title=f"Tessera: {name}", analytics_enabled=False, delete_cache=(600, 3600)) as blocks:
        gradio.Markdown(f"## Tessera: {name}\n{actions.description(pipeline)}")
        page = _Page(gradio, pipeline, limits, folder)
        with page.tabs:
            page.reconstruct_tab()
            page.sample_tab()
            page.complete_tab()
            page.swap_tab()
        page.connect_samples()
    return blocks.queue(max_size=16)


class _Page(Parts):
    """The tabs of one page. Components that one tab has and another needs are attributes."""

    def __init__(self, gradio, pipeline: Pipeline, limits: Limits, folder: Path):
        super().__init__(gradio, pipeline, limits, folder)
        # Not within the tabs, of which anything but a tab would upset the order
        self.sampled, self.chosen = gradio.State(None), gradio.State(None)
        self.tabs = gradio.Tabs()
        self.stops: dict[str, Event] = {}
        self.takers: dict[str, tuple[str, object]] = {}  # where an image may be sent: name -> tab, component

    def reconstruct_tab(self) -> None:
        gr = self.gr

        def reconstruct(value):
            with self.errors_in_page():
                result = actions.reconstruct(self.pipeline, self.drawn(value))
                both = self.sheet_file([result.image.cpu(), result.reconstruction], columns=2)
                return [both, f"PSNR **{result.psnr:.1f} dB**", *self.draw_codes(result.codes)]

        both, psnr, *codes = reconstruct(None)
        with gr.Tab("Reconstruct", id="reconstruct"):
            gr.Markdown("Draw, or take an image: this is what the codes keep of it.")
            with gr.Row():
                with self.editor_column():
                    self.drawing = self.editor("Draw here", "drawing", painting_mask=False)
                    start = gr.Button("Reconstruct", variant="primary", elem_id="reconstruct")
                with gr.Column(min_width=300):
                    seen = self.picture(
                        "As the model sees it, and its reconstruction", value=both, elem_id="reconstruction"
                    )
                    text = gr.Markdown(psnr, elem_id="psnr")
                with gr.Column(min_width=300):
                    codes = self.code_pictures("codes", codes)
        self.takers["Reconstruct"] = ("reconstruct", self.drawing)
        arguments = {"fn": reconstruct, "inputs": self.drawing, "outputs": [seen, text, *codes], **MODEL}
        start.click(**arguments)
        gr.on(
            [self.drawing.input, self.drawing.change], trigger_mode="always_last", show_progress="hidden", **arguments
        )

    def sample_tab(self) -> None:
        gr, most = self.gr, self.limits.max_images
        with gr.Tab("Sample", id="sample"), gr.Row(elem_id="sample-row"):
            with gr.Column(min_width=300):
                num_images = gr.Slider(1, most, min(16, most), step=1, label="Images", elem_id="num-images")
                controls = self.sampling_controls()
                watch_why, local_why = self.why.get("watch"), self.why.get("local")
                watch = gr.Checkbox(not watch_why, label="Watch the codes arrive", interactive=not watch_why,
                                    info=f"Not here: {watch_why}." if watch_why else None)  # fmt: skip
                local = gr.Checkbox(False, label="The same codes for all", interactive=not local_why,
                                    info=f"Not here: {local_why}." if local_why else
                                    "Only what the decoder draws of its own differs.")  # fmt: skip
            with gr.Column(min_width=300, scale=2):
                with gr.Row():
                    start = gr.Button("Sample", variant="primary", min_width=100, elem_id="sample")
                    again = gr.Button("Another seed", min_width=100)
                    stop = gr.Button("Stop", variant="stop", min_width=100, elem_id="stop", interactive=False)
                self.samples = self.picture("Samples", elem_id="samples")
                status = gr.Markdown("", elem_id="status")
                self.chosen_text = gr.Markdown("Click on an image to open it in another tab.")
                self.sending_row = gr.Row(visible=False)
        seed = controls[-1]

        def draw(count, watching, only_local, condition, temperature, top_k, top_p, min_p, scale, schedule, number,
                 request: gr.Request):  # fmt: skip
            stop_event = self.stops[request.session_hash] = Event()
            choices = Choices(condition, temperature, top_k, top_p, min_p, scale, schedule, number)
            started, now = time.monotonic(), "0 codes"
            try:
                with self.errors_in_page():
                    frames = actions.sample(self.pipeline, count, choices, limits=self.limits, stop=stop_event,
                                         watch=watching, local=only_local)  # fmt: skip
                    for frame in frames:
                        now = f"{frame.arrived} of {frame.length} codes, {time.monotonic() - started:.1f} s"
                        running = gr.update(interactive=frame.arrived < frame.length)
                        yield self.sheet_file(frame.images), now, frame.images, running
                    if stop_event.is_set():
                        yield gr.skip(), f"Stopped: {now}", gr.skip(), gr.update(interactive=False)
            finally:
                stop_event.set()  # also where the page is gone and nobody waits for the rest
                self.stops.pop(request.session_hash, None)

        def halt(request: gr.Request):
            if request.session_hash in self.stops:
                self.stops[request.session_hash].set()

        inputs = [num_images, watch, local, *controls]
        arguments = {"inputs": inputs, "outputs": [self.samples, status, self.sampled, stop], **MODEL}
        forget = {"fn": lambda: (None, gr.update(visible=False)), "outputs": [self.chosen, self.sending_row], **AT_ONCE}
        start.click(**forget).then(draw, **arguments)
        again.click(lambda: random.SystemRandom().randrange(2**31), None, seed, **AT_ONCE).then(**forget).then(
            draw, **arguments
        )
        stop.click(halt, **AT_ONCE)

    def connect_samples(self) -> None:
        """Lets an image be chosen among the samples and be sent to the canvases of other tabs."""
        gr = self.gr

        def choose(images, event: gr.SelectData):
            index = None if images is None else canvas.sheet(images).index_at(*event.index, images)
            if index is None:
                return None, "Click on an image to open it in another tab.", gr.update(visible=False)
            return images[index], f"Image {index + 1} is chosen. Open it in:", gr.update(visible=True)

        def send(image, tab):
            return self.canvas_file(image), gr.Tabs(selected=tab)

        self.samples.select(choose, self.sampled, [self.chosen, self.chosen_text, self.sending_row], **AT_ONCE)
        with self.sending_row:
            for name, (tab, component) in self.takers.items():
                button = gr.Button(name, size="sm", min_width=100, elem_id=f"send-to-{component.elem_id}")
                button.click(lambda image, tab=tab: send(image, tab), self.chosen, [component, self.tabs], **AT_ONCE)

    def complete_tab(self) -> None:
        gr, most = self.gr, self.limits.max_candidates
        with gr.Tab("Complete", id="complete"):
            if "complete" in self.why:
                gr.Markdown(f"Not with this pipeline: {self.why['complete']}.")
                return
            gr.Markdown("Take an image, and paint over what is to be drawn anew.")
            with gr.Row():
                with self.editor_column():
                    hole = self.editor("Paint over the part to fill", "hole", painting_mask=True)
                    copy = gr.Button("The drawing of the first tab", size="sm")
                    candidates = gr.Slider(1, most, min(8, most), step=1, label="Candidates")
                    ranked = [("most probable first", "log_prob"), ("by importance weights", "importance")]
                    ranking_why = self.why.get("importance")
                    ranking = gr.Radio(
                        ranked[:1] if ranking_why else ranked, value="log_prob", label="Ranking",
                        info=f"Importance weights not here: {ranking_why}." if ranking_why else
                        "Weights say how well what is known after the hole follows from what was drawn in it.",
                    )  # fmt: skip
                    keep = gr.Checkbox(False, label="Keep the known pixels exactly")
                    with gr.Accordion("Sampling options", open=False):
                        controls = self.sampling_controls()
                with gr.Column(min_width=300, scale=2):
                    start = gr.Button("Complete", variant="primary", elem_id="complete")
                    before = self.picture(
                        "The image, and what is hidden of it, rounded to whole codes", elem_id="hidden"
                    )
                    gr.Markdown("**Completions in the order of their ranking, with log p(codes) or weight**")
                    found = gr.Gallery(
                        label="Completions", show_label=False, columns=4, object_fit="contain", format="png",
                        height="auto", elem_classes="pixels", elem_id="completions", buttons=["download", "fullscreen"],
                        interactive=False,
                    )  # fmt: skip
        self.takers["Complete"] = ("complete", hole)

        def complete(value, count, by, keeping, *choices):
            with self.errors_in_page():
                image, mask = self.background(value), self.mask(value)
                result = actions.complete(
                    self.pipeline, image, mask, count, Choices(*choices), limits=self.limits, ranking=by,
                    keep_known_pixels=keeping,
                )  # fmt: skip
                hidden = torch.where(result.region[0].cpu(), torch.tensor(0.5), image)
                captions = [f"{value:.1f} nats" for value in result.log_prob[0].tolist()]
                if result.weights is not None:
                    captions = [f"weight {value:.2f}" for value in result.weights[0].tolist()]
                pictures = [self.canvas_file(image) for image in result.images]
                return self.sheet_file([image, hidden], columns=2), list(zip(pictures, captions))

        start.click(complete, [hole, candidates, ranking, keep, *controls], [before, found], **MODEL)
        copy.click(self.drawn_picture, self.drawing, hole, **MODEL)

    def swap_tab(self) -> None:
        gr, spec = self.gr, self.tokenizer.spec
        names = [f"level {i}: {' x '.join(map(str, shape))}" for i, shape in enumerate(spec.shapes)]
        regions = actions.regions(self.pipeline)
        with gr.Tab("Swap", id="swap"):
            gr.Markdown("Take some of the codes of image B into image A.")
            with gr.Row():
                with self.editor_column():
                    if actions.PAINTED in regions:
                        first = self.editor("Image A: may be painted over", "first", painting_mask=True)
                    else:
                        first = self.fillable_picture("Image A", "first")
                with self.editor_column():
                    second = self.fillable_picture("Image B", "second")
                with gr.Column(min_width=300):
                    levels = gr.CheckboxGroup(
                        [(name, i) for i, name in enumerate(names)], value=list(range(len(names))),
                        label="Levels to take from B", visible=len(names) > 1,
                    )  # fmt: skip
                    region = gr.Radio(regions, value=regions[1], label="Codes to take from B",
                                      info=f"By place, not here: {self.why['region']}." if "region" in self.why else
                                      "Regions of the image are rounded outwards to whole codes.")  # fmt: skip
                    start = gr.Button("Swap", variant="primary", elem_id="swap")
            with gr.Row():
                with gr.Column(min_width=300, scale=2):
                    result = self.picture("A, A with codes of B, and B, decoded from their codes", elem_id="swapped")
                with gr.Column(min_width=300):
                    codes = self.code_pictures("swapped-codes")
        self.takers |= {"Swap: A": ("swap", first), "Swap: B": ("swap", second)}

        def swap(value, other, chosen_levels, name):
            with self.errors_in_page():
                painted = self.mask(value) if name == actions.PAINTED else None
                taken = actions.taken_codes(self.pipeline, chosen_levels, name, painted)
                one, two = (self.pipeline.encode(self.background(image)[None]) for image in (value, other))
                mixed = actions.exchange(one, two, taken)
                images = [actions.decode(self.pipeline, codes) for codes in (one, mixed, two)]
                return [self.sheet_file(images, columns=3), *self.draw_codes(mixed, taken)]

        start.click(swap, [first, second, levels, region], [result, *codes], **MODEL)
