"""Scenes of one to three digits with captions that tell their places, as "a three left of a seven".

They are made to try priors that are conditional on text: everything a caption says can be checked in the picture, and
there are thousands of captions. Scene i is a function of (seed, split, i) alone, and the scans of a split's digits are
its own, so that a digit seen in validation was never seen in training.

Letters: H W height and width of the canvas in pixels.
"""

from typing import NamedTuple

import numpy as np
from PIL import Image

from pipelines.image_sources import Source, digit_scans

NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
SIDE = 8  # of a digit, in pixels
SMALLEST_CANVAS = (2 * SIDE, 2 * SIDE)
SPLITS = ("train", "validation", "test")
NUM_SCENES = {"train": 20_000, "validation": 2_000, "test": 2_000}
SCANS = {"train": 0.8, "validation": 0.1, "test": 0.1}  # share of the scans that each split's digits come from
NUM_DIGITS = (0.2, 0.5, 0.3)  # probabilities of one, two and three digits
# By axis; the first of each pair puts a thing into the first half of the canvas, the other into the second.
RELATIONS = (("above", "below"), ("left of", "right of"))


class Digit(NamedTuple):
    """One digit of a scene: which it is, and the (top, left) pixel of its 8x8 square."""

    number: int
    top: int
    left: int


class Scene(NamedTuple):
    caption: str
    digits: tuple[Digit, ...]


def draw_scene(generator: np.random.Generator, size: tuple[int, int]) -> Scene:
    """A caption and digits placed as it says, anywhere that is true, on a canvas of `size` (H, W).

    One digit lies anywhere. Of two, each stays within its half of the canvas along the axis that the caption speaks of,
    and lies anywhere along the other. A third, of which both others lie on one side, has that half to itself.
    """
    count = 1 + generator.choice(len(NUM_DIGITS), p=NUM_DIGITS)
    numbers = generator.integers(10, size=count).tolist()
    axis, half, half_of_both = generator.integers(2, size=3).tolist()
    relation, relation_of_both = RELATIONS[axis][half], RELATIONS[1 - axis][half_of_both]
    names = [_with_article(number) for number in numbers]
    if count == 1:
        caption, halves = names[0], [{}]
    elif count == 2:
        caption = f"{names[0]} {relation} {names[1]}"
        halves = [{axis: half}, {axis: 1 - half}]
    else:
        caption = f"{names[0]} {relation} {names[1]}, both {relation_of_both} {names[2]}"
        both = {1 - axis: half_of_both}
        halves = [{axis: half, **both}, {axis: 1 - half, **both}, {1 - axis: 1 - half_of_both}]
    places = [[_place(generator, size[axis], of_digit.get(axis)) for axis in (0, 1)] for of_digit in halves]
    return Scene(caption, tuple(Digit(number, *place) for number, place in zip(numbers, places)))


def _with_article(number: int) -> str:
    return f"{'an' if number == 8 else 'a'} {NAMES[number]}"


def _place(generator: np.random.Generator, size: int, half: int | None) -> int:
    """The first pixel of a digit along an axis of `size` pixels, within one half of it or anywhere."""
    low, high = {None: (0, size), 0: (0, size // 2), 1: (size // 2, size)}[half]
    return int(generator.integers(low, high - SIDE + 1))


class ScenesSource(Source):
    """Scenes of scikit-learn's digits, grey, with a caption each and without labels.

    Args:
        split: train, validation or test.
        size: (H, W) of the canvas, at least 16 x 16; None takes that.
        seed: seed of the scenes.
    Raises:
        ValueError: a canvas that two digits do not fit into side by side.
    """

    class_names: list[str] = []  # noqa: RUF012 (read only)
    carved = ()
    has_captions = True
    probe_count = 256  # all are equal in size

    def __init__(self, split: str, size: tuple[int, int] | None, seed: int):
        self.where = "the scenes"
        self.size = SMALLEST_CANVAS if size is None else size
        if min(self.size) < 2 * SIDE:
            raise ValueError(
                f"data.image_size must be at least {list(SMALLEST_CANVAS)} for scenes, whose digits lie side by side, "
                f"got {list(self.size)}"
            )
        self.split, self.seed = split, seed
        self._pixels, self._scans = _scans_of(split)

    def __len__(self) -> int:
        return NUM_SCENES[self.split]

    def name(self, index: int) -> str:
        return f"scene {index} of {self.split}"

    def read(self, index: int) -> tuple[Image.Image, int]:
        generator = self._generator(index)
        canvas = np.zeros(self.size, dtype=np.uint8)
        for number, top, left in draw_scene(generator, self.size).digits:
            scans = self._scans[number]
            scan = scans[generator.integers(len(scans))]
            canvas[top : top + SIDE, left : left + SIDE] = self._pixels[scan]
        return Image.fromarray(canvas), 0

    def scene(self, index: int) -> Scene:
        return draw_scene(self._generator(index), self.size)

    def caption(self, index: int) -> str:
        return self.scene(index).caption

    def _generator(self, index: int) -> np.random.Generator:
        return np.random.default_rng((self.seed, SPLITS.index(self.split), index))


def _scans_of(split: str) -> tuple[np.ndarray, list[np.ndarray]]:
    """All scans (1797, 8, 8), and the numbers of those of each digit that the split may use."""
    pixels, labels = digit_scans()
    start = sum(SCANS[other] for other in SPLITS[: SPLITS.index(split)])
    stop = start + SCANS[split]
    scans = []
    for number in range(len(NAMES)):
        of_number = np.random.default_rng(number).permutation(np.flatnonzero(labels == number))
        scans.append(of_number[round(start * len(of_number)) : round(stop * len(of_number))])
    return pixels, scans
