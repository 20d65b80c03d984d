"""Images continued beyond their edges: the prior as a sliding window over a larger map of codes, decoded as one."""

from collections.abc import Sequence
from dataclasses import replace
from numbers import Integral

import torch
from torch import Tensor

from pipelines.checkpoint import plain_weights, uncompiled
from pipelines.completion import candidate_generators, gumbel_noise, likelihoods
from pipelines.drawing import decode_codes, draw_codes, encode_images, progress_bar
from pipelines.labels import as_list
from pipelines.masks import check_geometry
from prior.base import Codes
from tokenizer.base import Tokenizer


def check_canvas(
    tokenizer: Tokenizer, size: tuple[int, int], position: tuple[int, int], stride: int | None
) -> tuple[tuple[int, int], tuple[int, int], int]:
    """Size, position and the stride of the window in pixels, by default half an image's shorter side, in whole codes.

    Raises:
        ValueError: the codes have no place in the image, do not cover it exactly, or a number does not fit them.
    """
    check_geometry(tokenizer)
    image = tokenizer.config.image_shape[1:]
    unit = max(tokenizer.code_strides)
    levels = zip(tokenizer.spec.shapes, tokenizer.code_strides)
    if any((rows * f, columns * f) != image for (rows, columns), f in levels):
        raise ValueError(
            f"images of {image[0]} x {image[1]} pixels are padded to whole codes of {unit} x {unit}, which would leave "
            f"a seam in a larger canvas; outpainting needs a tokenizer of images whose sides are multiples of {unit}"
        )
    sides, corner = _whole_pair(size), _whole_pair(position)
    if not sides or any(side % unit or side < least for side, least in zip(sides, image)):
        raise ValueError(
            f"size must be (height, width) in multiples of {unit}, at least {image[0]} x {image[1]}, "
            f"got {sides or size!r}"
        )
    room = [side - least for side, least in zip(sides, image)]
    if not corner or any(place % unit or not 0 <= place <= most for place, most in zip(corner, room)):
        raise ValueError(
            f"position must be (top, left) in multiples of {unit}, at most ({room[0]}, {room[1]}), "
            f"got {corner or position!r}"
        )
    default = max(unit, min(image) // 2 // unit * unit)
    stride = default if stride is None else stride
    if not isinstance(stride, Integral) or stride % unit or not unit <= stride <= min(image):
        raise ValueError(f"stride must be a multiple of {unit} from {unit} to {min(image)} pixels, got {stride!r}")
    return sides, corner, stride


def _whole_pair(values) -> tuple[int, ...]:
    """Two whole numbers, given as a sequence, an array or a tensor; empty where that is not what was given."""
    values = as_list(values)
    is_pair = isinstance(values, Sequence) and len(values) == 2 and all(isinstance(value, Integral) for value in values)
    return tuple(map(int, values)) if is_pair else ()


@torch.no_grad()
def outpaint(
    pipeline,
    images: Tensor,
    labels: Tensor | None,
    generators: list[torch.Generator],
    *,
    size: tuple[int, int],
    position: tuple[int, int],
    stride: int,
    num_candidates: int,
    keep_known_pixels: bool,
    batch_size: int,
    **options,
) -> tuple[Tensor, Codes]:
    """`Pipeline.outpaint` of checked inputs: images (B, C, *size) and their codes, one map per level.

    Args:
        images: (B, C, H, W) in [0, 1].
        labels: what the prior is conditional on, for each image.
        generators: one for each image.
    """
    tokenizer, strides = pipeline.tokenizer, pipeline.tokenizer.code_strides
    image = tokenizer.config.image_shape[1:]
    larger = canvas_tokenizer(tokenizer, size)
    canvas = [images.new_zeros(len(images), *shape, dtype=torch.int64) for shape in larger.spec.shapes]
    known = [torch.zeros(shape, dtype=torch.bool, device=images.device) for shape in larger.spec.shapes]
    encoded = encode_images(tokenizer, images.to(pipeline.dtype), batch_size=batch_size)
    for level, codes, mask, f in zip(encoded, canvas, known, strides):
        place = window_slices(position, image, f)
        codes[:, *place], mask[place] = level, True
    windows = [corner for corner in corners(size, position, image, stride) if corner != position]
    if labels is not None:
        labels = labels.repeat_interleave(num_candidates, dim=0)
    for corner in progress_bar(pipeline, windows, unit="window", desc="outpainting"):
        places = [window_slices(corner, image, f) for f in strides]
        inside = [mask[place] for mask, place in zip(known, places)]
        if all(mask.all() for mask in inside):
            continue
        given = (
            tuple(c[:, *place].repeat_interleave(num_candidates, dim=0) for c, place in zip(canvas, places)),
            tuple(mask.expand(len(images) * num_candidates, *mask.shape) for mask in inside),
        )
        candidates = candidate_generators(generators, num_candidates)
        drawn, _ = draw_codes(
            pipeline, labels, candidates, batch_size=batch_size, progress=None, given=given, **options
        )
        if num_candidates > 1:
            drawn = resample(pipeline.prior, drawn, given[1], labels, candidates, num_candidates, batch_size)
        for codes, mask, place, level in zip(canvas, known, places, drawn):
            codes[:, *place], mask[place] = level, True
    pixels = decode_codes(larger, tuple(canvas), generators, batch_size=batch_size).float()
    if keep_known_pixels:
        pixels[:, :, *window_slices(position, image, 1)] = images.float()
    return pixels, tuple(canvas)


def resample(prior, codes: Codes, known, labels, generators, num_candidates: int, batch_size: int) -> Codes:
    """One of the candidates of each image, drawn with their importance weights."""
    _, log_weights = likelihoods(prior, codes, known, labels, "importance", batch_size)
    scores = (log_weights + gumbel_noise(generators, log_weights.device)).unflatten(0, (-1, num_candidates))
    chosen = scores.argmax(dim=1) + num_candidates * torch.arange(len(scores), device=scores.device)
    return tuple(level[chosen] for level in codes)


def corners(
    size: tuple[int, int], start: tuple[int, int], window: tuple[int, int], stride: int
) -> list[tuple[int, int]]:
    """Upper left corners (top, left) of windows that cover the canvas, those near the start first.

    From the start on, each is at most a stride from one that comes before it.
    """
    axes = []
    for side, first, width in zip(size, start, window):
        last = side - width
        before, after = range(first, 0, -stride), range(first, last, stride)
        axes.append(sorted({0, last, *before, *after}))
    distance = {(top, left): abs(top - start[0]) + abs(left - start[1]) for top in axes[0] for left in axes[1]}
    return sorted(distance, key=lambda corner: (distance[corner], corner))


def window_slices(corner: tuple[int, int], window: tuple[int, int], code_stride: int) -> tuple[slice, slice]:
    """Rows and columns of a map of codes that a window in pixels covers."""
    return tuple(slice(begin // code_stride, (begin + side) // code_stride) for begin, side in zip(corner, window))


def canvas_tokenizer(tokenizer: Tokenizer, size: tuple[int, int]) -> Tokenizer:
    """The same tokenizer, with the same weights, for images of another size.

    Convolutions do not know the size of their input; away from its edges a canvas is decoded as images are. Group
    normalisation and attention, which see the whole canvas, are used on more than they were trained on.

    Raises:
        ValueError: the tokenizer has weights whose shapes depend on the size, or layers of another kind than it was
            built with.
    """
    tokenizer = uncompiled(tokenizer)
    config = replace(tokenizer.config, image_shape=(tokenizer.config.image_shape[0], *size))
    reference = next(tokenizer.parameters())
    with torch.random.fork_rng(devices=[]):  # the weights drawn here are thrown away
        larger = type(tokenizer)(config)
    weights = plain_weights(tokenizer)
    if weights.keys() != larger.state_dict().keys():
        raise ValueError(
            f"layers of {type(tokenizer).__name__} were replaced or parametrized, so that no tokenizer for a canvas of "
            f"{size[0]} x {size[1]} takes its weights; merge adapters, and remove pruning and parametrizations"
        )
    try:
        larger.load_state_dict(weights, assign=True)
    except RuntimeError as error:
        raise ValueError(
            f"{type(tokenizer).__name__} has weights that depend on the size of its images and cannot decode a canvas "
            f"of {size[0]} x {size[1]}: {error}"
        ) from error
    return larger.to(reference.device, reference.dtype).eval()
