"""What the demo page does, without the page: what a pipeline can do, and doing it, within limits."""

import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from numbers import Integral
from threading import Event
from typing import NamedTuple

import torch
from torch import Tensor

from pipelines.animation import CodeRecording, partial_images
from pipelines.checkpoint import uncompiled
from pipelines.completion import Completions
from pipelines.masks import HALVES, code_masks, named_mask
from pipelines.metrics import psnr
from pipelines.two_stage import Pipeline
from prior import RBM, Uniform
from prior.base import Codes, Prior
from tokenizer.base import Tokenizer

NUM_FRAMES = 24  # states that are shown while codes arrive
SECONDS_PER_FRAME = 0.08  # at least, so that they are seen also where drawing takes no time
ANY_CLASS, NO_CLASS = "any class", "no class"
PAINTED = "painted"
POSITIONS = ("all", "first half", "second half")


@dataclass(frozen=True)
class Limits:
    """What one visitor may ask for.

    Args:
        max_images: drawn at a time.
        max_candidates: completions at a time.
        max_upload_bytes: of one file.
        max_pixels: of an uploaded picture, before it is resized.
    Raises:
        ValueError: a limit below 1.
    """

    max_images: int = 64
    max_candidates: int = 16
    max_upload_bytes: int = 8_000_000
    max_pixels: int = 16_000_000

    def __post_init__(self):
        for name, value in vars(self).items():
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")


# What a pipeline can do
# ------------------------------------------------------------------------------------------------


def refusals(pipeline: Pipeline) -> dict[str, str]:
    """By name of an option or ability that this pipeline cannot honour: why.

    Names are those of `Prior.sample`'s options, and: "watch" (codes that arrive one by one), "complete", "importance"
    (that ranking of completions), "region" (codes with a place in the image), "local" (resample = "local"),
    "unconditional" (no class, or no caption) and "cold" (temperature 0).
    """
    prior, tokenizer = uncompiled(pipeline.prior), uncompiled(pipeline.tokenizer)
    who = type(prior).__name__
    names = ("temperature", "top_k", "top_p", "min_p", "guidance_scale", "guidance_schedule")
    why = {name: f"{who} cannot honour it" for name in names if name not in prior.sampling_options}
    no_guidance = _why_no_guidance(prior)
    if no_guidance:
        why |= dict.fromkeys(("guidance_scale", "guidance_schedule", "unconditional"), no_guidance)
    if isinstance(prior, (RBM, Uniform)):
        why["cold"] = f"{who} does not know its most probable codes"
    if tokenizer.code_strides is None:
        why["region"] = f"the codes of {type(tokenizer).__name__} describe the image as a whole and have no place in it"
        why["complete"] = f"{why['region']}, so a region cannot be filled"
        why["watch"] = f"{why['region']}, so images cannot be shown in part"
    if "given" not in prior.sampling_options:
        why.setdefault("complete", f"{who} cannot draw some codes given others")
    if "codes_callback" not in prior.sampling_options:
        why["watch"] = f"{who} draws all codes at once, not one after another"
    if type(prior).log_prob_by_code is Prior.log_prob_by_code:
        why["importance"] = f"{who} does not predict one code after another"
    if not tokenizer.has_local_latents:
        why["local"] = f"the decoder of {type(tokenizer).__name__} draws nothing of its own"
    return why


def _why_no_guidance(prior: Prior) -> str | None:
    if "guidance_scale" not in prior.sampling_options:
        return f"{type(prior).__name__} cannot honour it"
    if not prior.num_classes and not prior.conditional_on_text:
        return "the prior is unconditional"
    if not prior.learned_unconditional:
        return "the prior was trained without class dropout"
    return None


def classes(pipeline: Pipeline) -> list[str]:
    """What may be chosen as a class: names, or numbers where there are none; empty without classes."""
    if not pipeline.prior.num_classes:
        return []
    names = [*pipeline.class_names, *map(str, range(len(pipeline.class_names), pipeline.prior.num_classes))]
    return [ANY_CLASS, *([] if "unconditional" in refusals(pipeline) else [NO_CLASS]), *names]


def description(pipeline: Pipeline) -> str:
    """One line: what the pipeline is made of."""
    tokenizer, prior = uncompiled(pipeline.tokenizer), uncompiled(pipeline.prior)
    channels, height, width = tokenizer.config.image_shape
    levels = []
    for shape, vocab_size in zip(tokenizer.spec.shapes, tokenizer.spec.vocab_sizes):
        levels.append(f"{' x '.join(map(str, shape))} {f'of {vocab_size}' if vocab_size else 'real numbers'}")
    condition = "captions" if prior.conditional_on_text else f"{prior.num_classes} classes"
    given = f", given {condition}" if prior.conditional_on_text or prior.num_classes else ""
    if not pipeline.has_stage_two:
        learned = any(True for _ in prior.parameters())
        given += ", learned with the tokenizer" if learned else ", as assumed in training"
    return (
        f"{type(tokenizer).__name__} of {'grey' if channels == 1 else 'colour'} images of {height} x {width} pixels, "
        f"codes {' + '.join(levels)}; prior {type(prior).__name__}{given}"
    )


# Drawing
# ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Choices:
    """Sampling options as the page's controls give them: their ends and 0 stand for "off".

    Args:
        condition: a class, `ANY_CLASS` or `NO_CLASS`; or a caption, "" for none; or None.
        temperature, guidance_scale, guidance_schedule: as in `Prior.sample`.
        top_k: 0 keeps every code.
        top_p: 1 keeps every code.
        min_p: 0 keeps every code.
        seed: of all that is drawn.
    """

    condition: str | None = None
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    guidance_scale: float = 1.0
    guidance_schedule: str = "constant"
    seed: int = 0

    def options(self, pipeline: Pipeline) -> dict:
        """Arguments of `Pipeline.sample` and `Pipeline.complete`.

        Raises:
            ValueError: a seed that is not an integer of at least 0.
        """
        if not isinstance(self.seed, (int, float)) or not 0 <= self.seed < 2**63 or self.seed != int(self.seed):
            raise ValueError(f"seed must be an integer of at least 0, got {self.seed}")
        options = {
            "temperature": self.temperature,
            "top_k": int(self.top_k) or None,
            "top_p": self.top_p,
            "min_p": self.min_p,
            "guidance_scale": self.guidance_scale,
            "guidance_schedule": self.guidance_schedule,
            "generator": torch.Generator().manual_seed(int(self.seed)),
        }
        if pipeline.prior.conditional_on_text:
            return options | {"prompts": self.condition or ""}
        if self.condition == NO_CLASS:
            return options | {"guidance_scale": 0.0, "guidance_schedule": "constant"}  # 0 is unconditional
        if pipeline.prior.num_classes and self.condition not in (None, ANY_CLASS):
            named = self.condition in pipeline.class_names
            return options | {"class_labels": self.condition if named else int(self.condition)}
        return options


class Frame(NamedTuple):
    """Images (B, C, H, W) in [0, 1] while their codes arrive, how many codes of each are there, and of how many."""

    images: Tensor
    arrived: int
    length: int


class StoppedError(Exception):
    """Raised within a drawing that a person stopped."""


def check_count(name: str, count, most: int) -> int:
    """The count as an integer. Raises ValueError unless it lies in [1, most]: a page's controls bind no program."""
    if not isinstance(count, (Integral, float)) or not 1 <= count <= most or count != int(count):
        raise ValueError(f"{name} must be an integer from 1 to {most}, got {count}")
    return int(count)


def sample(
    pipeline: Pipeline,
    num_images: int,
    choices: Choices,
    *,
    limits: Limits,
    stop: Event,
    watch: bool = True,
    local: bool = False,
    seconds_per_frame: float = SECONDS_PER_FRAME,
) -> Iterator[Frame]:
    """Draws images; where `watch` is set and the prior can, yields them in part while their codes arrive.

    The last frame holds the finished images. Where `stop` is set meanwhile, it is the last one that was begun. Closing
    the iterator stops the drawing as well.

    Args:
        local: whether to draw codes once and, for each image, only the decoder's own latents.
    Raises:
        ValueError: as `Pipeline.sample`; too many images.
    """
    num_images = check_count("the number of images", num_images, limits.max_images)
    options = {**choices.options(pipeline), "resample": "local" if local else "all", "batch_size": num_images}
    length = pipeline.prior.spec.length
    if not watch or "watch" in refusals(pipeline):
        yield Frame(pipeline.sample(num_images, output_type="pt", **options), length, length)
        return
    recording = CodeRecording(pipeline.prior.spec, NUM_FRAMES)

    def record(codes: Codes, arrived: Codes) -> None:
        if stop.is_set():
            raise StoppedError
        recording(codes, arrived)

    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(pipeline.sample, num_images, output_type="pt", codes_callback=record, **options)
        try:
            yield from _frames_so_far(pipeline.tokenizer, recording, future, stop, seconds_per_frame)
            if not stop.is_set():
                yield Frame(future.result(), length, length)
        except BaseException:  # also that of a generator which is closed because its page is gone
            stop.set()
            raise


def _frames_so_far(
    tokenizer: Tokenizer, recording: CodeRecording, future, stop: Event, seconds_per_frame: float
) -> Iterator[Frame]:
    """The recorded states at an even pace; some are left out where decoding them takes longer than the pace."""
    shown, started = -1, time.monotonic()
    while not stop.is_set() and not (future.done() and shown == len(recording.states) - 1):
        due = (time.monotonic() - started) / max(seconds_per_frame, 1e-9)
        due = min(int(due), len(recording.states) - 1)
        if due > shown:
            codes, arrived = recording.states[due]
            done = sum(int(there[0].sum()) for there in arrived)
            with torch.no_grad():
                yield Frame(partial_images(tokenizer, codes, arrived).float().cpu(), done, recording.length)
            shown = due
        else:
            time.sleep(seconds_per_frame / 4)


# Reconstruction, completion, exchange
# ------------------------------------------------------------------------------------------------


class Reconstruction(NamedTuple):
    """An image (C, H, W) in [0, 1] as the model sees it, its codes (1, *shape) per level, what is left, PSNR in dB."""

    image: Tensor
    codes: Codes
    reconstruction: Tensor
    psnr: float


def reconstruct(pipeline: Pipeline, image: Tensor, seed: int = 0) -> Reconstruction:
    """Encodes and decodes an image (C, H, W) in [0, 1]; the seed is for decoders with latents of their own."""
    codes = pipeline.encode(image[None])
    decoded = decode(pipeline, codes, seed)
    return Reconstruction(image, codes, decoded, psnr(decoded[None], image[None].float().cpu()).item())


def decode(pipeline: Pipeline, codes: Codes, seed: int = 0) -> Tensor:
    """(C, H, W) in [0, 1] of the codes of one image."""
    return pipeline.decode(codes, generator=torch.Generator().manual_seed(seed), output_type="pt")[0]


def complete(
    pipeline: Pipeline,
    image: Tensor,
    mask: Tensor,
    num_candidates: int,
    choices: Choices,
    *,
    limits: Limits,
    ranking: str = "log_prob",
    keep_known_pixels: bool = False,
) -> Completions:
    """`Pipeline.complete` of one image (C, H, W) with a mask (H, W), the images as a tensor.

    Raises:
        ValueError: as `Pipeline.complete`; too many candidates.
    """
    num_candidates = check_count("the number of candidates", num_candidates, limits.max_candidates)
    return pipeline.complete(
        image[None], mask, num_candidates=num_candidates, ranking=ranking, keep_known_pixels=keep_known_pixels,
        output_type="pt", **choices.options(pipeline),
    )  # fmt: skip


def regions(pipeline: Pipeline) -> list[str]:
    """Names of the parts of the codes that `taken_codes` knows."""
    if pipeline.tokenizer.code_strides is None:
        return list(POSITIONS)
    return [POSITIONS[0], *(f"{half} half" for half in HALVES), PAINTED]


def taken_codes(
    pipeline: Pipeline, levels: Sequence[int], region: str, painted: Tensor | None = None
) -> tuple[Tensor, ...]:
    """Per level a boolean mask (1, *shape) of the codes that are taken from the other image.

    Args:
        levels: those of which codes are taken.
        region: one of `regions`; regions of the image are rounded outwards to whole codes.
        painted: (H, W) boolean, for the region `PAINTED`.
    Raises:
        ValueError: no level, or a region that there is not.
    """
    spec = pipeline.tokenizer.spec
    if not levels or not set(levels) <= set(range(spec.num_levels)):
        raise ValueError(f"choose at least one of the levels 0 to {spec.num_levels - 1}, got {list(levels)}")
    if region not in regions(pipeline):
        raise ValueError(f"unknown region {region!r}; choose from {', '.join(regions(pipeline))}")
    if region in POSITIONS:
        halves = [torch.arange(length) < (length + 1) // 2 for length in spec.lengths]
        chosen = {"all": [half | True for half in halves], "first half": halves,
                  "second half": [~half for half in halves]}[region]  # fmt: skip
        masks = [part.view(1, *shape) for part, shape in zip(chosen, spec.shapes)]
    else:
        mask = painted if region == PAINTED else named_mask(region.removesuffix(" half"), pipeline.tokenizer)
        masks = code_masks(mask[None, None], pipeline.tokenizer)[0]
    return tuple(mask if level in levels else torch.zeros_like(mask) for level, mask in enumerate(masks))


def exchange(first: Codes, second: Codes, taken: tuple[Tensor, ...]) -> Codes:
    """Codes of the first image, with those of the second where `taken` says so."""
    return tuple(torch.where(mask.to(a.device), b, a) for a, b, mask in zip(first, second, taken))
