"""Codes of one image as pictures: a coloured cell for each code, with its index where there is room for it."""

import colorsys
import math

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

SIDE = 448  # of a picture in pixels, about
SMALLEST_CELL, LARGEST_CELL = 4, 96
SMALLEST_FONT, LARGEST_FONT = 9, 18
GOLDEN_RATIO = (1 + math.sqrt(5)) / 2
NO_CODE = (128, 128, 128)


def code_picture(code: Tensor, vocab_size: int | None, marked: Tensor | None = None) -> Image.Image:
    """The codes of one level of one image, RGB.

    Each integer has a colour of its own, as different as possible from those of its neighbours among the integers; real
    numbers go from blue (negative) over white (0) to red, scaled by the largest. A vector is wrapped into rows.

    Args:
        code: (h, w), or (n,), without the batch.
        vocab_size: K, or None for real numbers.
        marked: of the same shape, boolean: codes that get a frame.
    """
    grid, there = wrapped(code.detach().cpu())
    rows, columns = grid.shape
    cell = min(LARGEST_CELL, max(SMALLEST_CELL, SIDE // max(rows, columns)))
    colours = _integer_colours(grid, vocab_size) if vocab_size else _real_colours(grid.float())
    colours[~there.numpy()] = NO_CODE
    picture = Image.fromarray(np.kron(colours, np.ones((cell, cell, 1), dtype=np.uint8)))
    draw = ImageDraw.Draw(picture)
    frames = None if marked is None else wrapped(marked.detach().cpu())[0]
    labels = [[f"{value:d}" if vocab_size else f"{value:+.1f}" for value in row] for row in grid.tolist()]
    font = _fitting_font(cell, max((label for row in labels for label in row), key=len))
    for y, x in there.nonzero().tolist():
        if font is not None:
            fill = "black" if _luminance(colours[y, x]) > 128 else "white"
            draw.text(((x + 0.5) * cell, (y + 0.5) * cell), labels[y][x], fill=fill, font=font, anchor="mm")
        if frames is not None and frames[y, x]:
            _draw_frame(draw, x * cell, y * cell, cell)
    return picture


def wrapped(code: Tensor) -> tuple[Tensor, Tensor]:
    """A level's codes as a grid (h, w), vectors in rows of about equal number, and where in it there are any."""
    if code.dim() != 1:
        grid = code.flatten(0, -2)
        return grid, torch.ones_like(grid, dtype=torch.bool)
    columns = math.ceil(math.sqrt(len(code)))
    rows = math.ceil(len(code) / columns)
    padded = torch.zeros(rows * columns, dtype=code.dtype)
    padded[: len(code)] = code
    return padded.view(rows, columns), (torch.arange(rows * columns) < len(code)).view(rows, columns)


def _integer_colours(grid: Tensor, vocab_size: int) -> np.ndarray:
    """(h, w, 3) uint8. Steps of the golden ratio around the circle of hues never come close to an earlier one."""
    if vocab_size == 2:
        return np.array([(40, 40, 48), (236, 232, 214)], dtype=np.uint8)[grid.numpy()]
    codes, places = np.unique(grid.numpy(), return_inverse=True)
    palette = np.array([
        colorsys.hsv_to_rgb(i / GOLDEN_RATIO % 1, (0.45, 0.65, 0.85)[i % 3], (0.95, 0.8, 0.65)[i // 3 % 3])
        for i in codes.tolist()
    ])  # fmt: skip
    return (palette * 255).round().astype(np.uint8)[places.reshape(grid.shape)]


def _real_colours(grid: Tensor) -> np.ndarray:
    """(h, w, 3) uint8."""
    share = (grid / grid.abs().max().clamp(min=1e-12)).numpy()[..., None]
    ends = np.where(share > 0, np.array([178.0, 24, 43]), np.array([33.0, 102, 172]))
    return (255 + np.abs(share) * (ends - 255)).round().astype(np.uint8)


def _fitting_font(cell: int, longest: str) -> ImageFont.FreeTypeFont | None:
    """The largest font in which the longest label fits into a cell, if any is legible."""
    for size in range(LARGEST_FONT, SMALLEST_FONT - 1, -1):
        font = ImageFont.load_default(size)
        if font.getlength(longest) <= cell - 4 and size <= cell - 4:
            return font
    return None


def _luminance(colour: np.ndarray) -> float:
    return float(colour @ np.array([0.299, 0.587, 0.114]))


def _draw_frame(draw: ImageDraw.ImageDraw, left: int, top: int, cell: int) -> None:
    """Black within white: seen on every colour."""
    right, bottom, width = left + cell - 1, top + cell - 1, max(1, cell // 24)
    draw.rectangle((left, top, right, bottom), outline="white", width=width)
    draw.rectangle((left + width, top + width, right - width, bottom - width), outline="black", width=width)
