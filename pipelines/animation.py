"""Codes that arrive one after another, as an animated picture."""

import math
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from pipelines.files import atomic_file
from pipelines.masks import check_geometry
from pipelines.pictures import grid_picture
from prior.base import Codes, CodeSpec
from tokenizer.base import Tokenizer

NUM_STAND_INS = 64  # codes, the mean of whose vectors stands for one that is not there yet
SECONDS = 6.0  # until they are all there
LAST_SECONDS = 1.5  # that the finished images stay


class CodeRecording:
    """A `codes_callback` for sampling one batch that keeps what it is told, evenly, for `save_animation`.

    Args:
        spec: the code space.
        num_frames: about so many states are kept, the first, of given codes alone, and the last among them.
    Raises:
        ValueError: num_frames is below 2; a second batch is told of.
    """

    def __init__(self, spec: CodeSpec, num_frames: int = 64):
        if num_frames < 2:
            raise ValueError(f"an animation needs at least 2 frames, got {num_frames}")
        self.every = math.ceil(spec.length / (num_frames - 1))
        self.spec, self.length, self.calls = spec, spec.length, 0
        self.states: list[tuple[Codes, Codes]] = []

    def __call__(self, codes: Codes, arrived: Codes) -> None:
        if self.calls == self.length:
            raise ValueError("an animation shows one batch: take a batch_size of at least the number of images")
        if self.calls == 0:
            self.states.append((codes, self._given(arrived)))
        self.calls += 1
        at_once = self.calls == 1 and all(there.all() for there in arrived)  # by priors that call no second time
        if self.calls % self.every == 0 or self.calls == self.length or at_once:
            self.states.append((codes, arrived))

    def _given(self, arrived: Codes) -> Codes:
        """Which codes were there before the first one was drawn, as far as the first call tells.

        What is there then is the first code, and those that are given. Whether the first is given too, nothing tells:
        it is taken to be as the one after it, which is beside it. Of codes that come all at once, none is.
        """
        sequence = self.spec.flatten(arrived)
        if sequence.all():
            return tuple(torch.zeros_like(there) for there in arrived)
        return self.spec.unflatten(torch.cat([sequence[:, 1:2], sequence[:, 1:]], dim=1))


def partial_images(tokenizer: Tokenizer, codes: Codes, arrived: Codes) -> Tensor:
    """Images (B, C, H, W) in [0, 1] of codes that are only partly there.

    A code that is missing is decoded as the mean of the vectors that codes stand for, which says nothing; pixels in
    whose place no code of any level is there are grey.

    Args:
        arrived: per level, a boolean mask of the codes that are there; the values of others do not matter.
    Raises:
        ValueError: the tokenizer's codes have no place in the image, or stand for no vectors.
    """
    check_geometry(tokenizer)
    # the same codes everywhere, so that what is missing looks the same everywhere; all of a small codebook
    generator = torch.Generator().manual_seed(0)
    vocab_sizes = tokenizer.spec.vocab_sizes
    stand_ins = [torch.randperm(k, generator=generator, device="cpu")[:NUM_STAND_INS] for k in vocab_sizes]
    num_stand_ins = max(map(len, stand_ins))
    total = None
    for i in range(num_stand_ins):
        guess = tuple(
            torch.where(there, code, ids[i % len(ids)].item()) for code, there, ids in zip(codes, arrived, stand_ins)
        )
        vectors = tokenizer.embed(guess)
        total = vectors if total is None else tuple(a + b for a, b in zip(total, vectors))
    images = tokenizer.decode_embedded(tuple(vector / num_stand_ins for vector in total))
    height, width = images.shape[-2:]
    seen = torch.zeros_like(images[:, :1], dtype=torch.bool)
    for there, stride in zip(arrived, tokenizer.code_strides):
        place = there.repeat_interleave(stride, dim=1).repeat_interleave(stride, dim=2)
        seen |= place[:, None, :height, :width]
    return torch.where(seen, images, 0.5)


@torch.no_grad()
def save_animation(recording: CodeRecording, tokenizer: Tokenizer, path: Path, *, columns: int) -> Path:
    """Writes a GIF of a grid of images whose codes arrive in the order in which they were drawn.

    Raises:
        ValueError: nothing was recorded, or what `partial_images` raises.
    """
    if not recording.states:
        raise ValueError("nothing was recorded: give the recording to `sample` as its codes_callback first")
    frames = [grid_picture(partial_images(tokenizer, *state), columns) for state in recording.states]
    if frames[0].mode == "RGB":  # a palette of its own for each frame, without the flicker of dithering
        frames = [frame.quantize(256, dither=Image.Dither.NONE) for frame in frames]
    durations = [round(1000 * SECONDS / len(frames))] * (len(frames) - 1) + [round(1000 * LAST_SECONDS)]
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as file:
        frames[0].save(file, format="GIF", save_all=True, append_images=frames[1:], duration=durations, loop=0)
    return path
