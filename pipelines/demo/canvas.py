"""Pictures that a person uploads, draws on and looks at, and the images of a tokenizer that they stand for.

They are enlarged by whole factors, so that what is not drawn on can be brought back exactly.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from pipelines.outputs import as_output_type
from pipelines.pictures import PADDING, SMALLEST_SIDE, grid_picture
from pipelines.preprocessing import preprocess_image, upright
from tokenizer.base import Tokenizer

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")  # that Pillow reads by itself, without other programs
CANVAS_SIDE = 336  # pixels, about: fits a phone
SHEET_SIDE = 640  # pixels, about


def open_upload(path: str, *, max_bytes: int, max_pixels: int) -> Image.Image:
    """An uploaded picture, decoded and upright. Its size is looked at before it is decoded.

    Raises:
        ValueError: no image, one of a format that is not taken, a damaged one, or one with too many bytes or pixels.
    """
    name = Path(path).name
    if Path(path).stat().st_size > max_bytes:
        raise ValueError(f"{name} has {Path(path).stat().st_size:,} bytes; the limit is {max_bytes:,}")
    try:
        picture = Image.open(path, formats=FORMATS)
    except MemoryError:
        raise
    except Image.DecompressionBombError as error:
        raise ValueError(f"{name} has too many pixels; the limit is {max_pixels:,}") from error
    except Exception as error:  # Pillow's are of many types
        raise ValueError(f"{name} is not an image that can be read; take {', '.join(FORMATS)}") from error
    with picture:
        if picture.width * picture.height > max_pixels:
            size = f"{picture.width:,} x {picture.height:,} = {picture.width * picture.height:,} pixels"
            raise ValueError(f"{name} has {size}; the limit is {max_pixels:,}. Make it smaller first")
        try:
            return upright(picture)
        except MemoryError:
            raise
        except Exception as error:
            raise ValueError(f"{name} is damaged: {error}") from error


def as_seen(picture: Image.Image, tokenizer: Tokenizer) -> Tensor:
    """(C, H, W) in [0, 1]: a picture as the model sees it, prepared as in training where the model says how."""
    channels, height, width = tokenizer.config.image_shape
    plain = {"image_size": [height, width], "channels": channels, "resize_filter": "bicubic", "crop": "center",
             "binarize": "none"}  # fmt: skip
    return preprocess_image(picture, {**plain, **tokenizer.config.preprocessing})


def canvas_factor(tokenizer: Tokenizer) -> int:
    """How many pixels of a canvas, along each side, stand for one of the image."""
    return max(1, CANVAS_SIDE // max(tokenizer.config.image_shape[1:]))


def canvas_size(tokenizer: Tokenizer) -> tuple[int, int]:
    """(width, height) of a canvas to draw on."""
    factor = canvas_factor(tokenizer)
    return tokenizer.config.image_shape[2] * factor, tokenizer.config.image_shape[1] * factor


def on_canvas(image: Tensor, tokenizer: Tokenizer) -> Image.Image:
    """(C, H, W) in [0, 1] as an RGB picture of `canvas_size`."""
    (picture,) = as_output_type(image[None], "pil")
    return picture.convert("RGB").resize(canvas_size(tokenizer), Image.Resampling.NEAREST)


def from_canvas(background: Image.Image | None, strokes: Sequence[Image.Image], tokenizer: Tokenizer) -> Tensor:
    """(C, H, W) in [0, 1]: what stands on a canvas, black where nothing does; without strokes exactly `on_canvas`'s."""
    canvas = Image.new("RGBA", canvas_size(tokenizer), "black")
    for layer in [background, *strokes]:
        if layer is not None:
            canvas = Image.alpha_composite(canvas, _of_canvas_size(layer, tokenizer))
    _, height, width = tokenizer.config.image_shape
    return as_seen(canvas.convert("RGB").resize((width, height), Image.Resampling.BOX), tokenizer)


def painted_mask(strokes: Sequence[Image.Image], tokenizer: Tokenizer) -> Tensor:
    """(H, W) boolean: the pixels that the strokes on a canvas touch.

    Raises:
        ValueError: they touch none.
    """
    _, height, width = tokenizer.config.image_shape
    mask = np.zeros((height, width), dtype=bool)
    for layer in strokes:
        touched = np.asarray(_of_canvas_size(layer, tokenizer).getchannel("A")) >= 128
        shares = Image.fromarray(touched.astype(np.float32)).resize((width, height), Image.Resampling.BOX)
        mask |= np.asarray(shares) > 0
    if not mask.any():
        raise ValueError("nothing is painted: paint over the part of the image that is meant")
    return torch.from_numpy(mask)


def _of_canvas_size(layer: Image.Image, tokenizer: Tokenizer) -> Image.Image:
    return layer.convert("RGBA").resize(canvas_size(tokenizer), Image.Resampling.NEAREST)


class Sheet(NamedTuple):
    """A picture of several images (B, C, H, W), and what tells which of them lies at one of its pixels."""

    picture: Image.Image
    columns: int
    factor: int

    def index_at(self, x: int, y: int, images: Tensor) -> int | None:
        """The number of the image at pixel (x, y); None between or beyond them."""
        if len(images) == 1:  # has no frame
            return 0
        enlarged = max(1, SMALLEST_SIDE // min(images.shape[-2:]))
        height, width = (side * enlarged + PADDING for side in images.shape[-2:])
        column, left = divmod(x // self.factor - PADDING, width)
        row, top = divmod(y // self.factor - PADDING, height)
        between = left >= width - PADDING or top >= height - PADDING
        index = row * self.columns + column
        outside = not 0 <= column < self.columns or row < 0 or index >= len(images)
        return None if between or outside else index


def sheet(images: Tensor, columns: int | None = None) -> Sheet:
    """(B, C, H, W) in [0, 1] as a grid, about as wide as high, enlarged to a size that a person sees well."""
    columns = columns or min(len(images), max(2, round(len(images) ** 0.5)))
    picture = grid_picture(images, columns)
    factor = max(1, SHEET_SIDE // max(picture.size))
    size = (picture.width * factor, picture.height * factor)
    return Sheet(picture.resize(size, Image.Resampling.NEAREST), columns, factor)
