"""From a picture of any mode and size to the array that models are trained on, the same way each time."""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor


class BadImageError(ValueError):
    """A file that cannot be read as an image; the message names it."""


@contextmanager
def naming_image(name: str) -> Iterator[None]:
    """Pillow's errors, of many types, rarely say which file they are about."""
    try:
        yield
    except MemoryError:
        raise
    except Image.DecompressionBombError as error:
        raise BadImageError(f"{name}: {error} To read it all the same, raise PIL.Image.MAX_IMAGE_PIXELS") from error
    except Exception as error:
        raise BadImageError(f"{name}: cannot be read as an image: {error}") from error


def load(image: Image.Image) -> None:
    """Decodes. Pillow 13 mixes up the pixels of uncompressed TIFFs that lie on their side; their size betrays it."""
    announced = image.size
    image.load()
    if image.format == "TIFF" and image.size != announced:
        raise BadImageError("an uncompressed TIFF with a sideways orientation; save it compressed, or as PNG")


def _sixteen_to_eight_bits(image: Image.Image) -> Image.Image:
    """Scales 0..65535 to 0..255; Pillow's own conversion clips everything above 255."""
    values = np.asarray(image).astype(np.int64)
    if values.min() < 0 or values.max() > 65535:
        raise BadImageError(f"grey values from {values.min()} to {values.max()} do not fit into 16 bits; convert it")
    return Image.fromarray(((values + 128) // 257).astype(np.uint8))


def upright(image: Image.Image) -> Image.Image:
    """The image decoded, and turned as its file says that it is to be seen."""
    load(image)
    return ImageOps.exif_transpose(image)


def in_eight_bits(image: Image.Image) -> Image.Image:
    """The image upright, in a mode of at most 8 bits."""
    image = upright(image)
    if image.mode.startswith("I"):
        image = _sixteen_to_eight_bits(image)
    if image.mode == "F":
        raise BadImageError("its pixels are floating point, of unknown range; convert it to 8 or 16 bits")
    return image


def to_mode(image: Image.Image, channels: int) -> Image.Image:
    """The image upright, opaque (on white), in 8 bits, grey or RGB."""
    image = in_eight_bits(image)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    if channels == 1 and image.mode not in ("1", "L"):
        image = image.convert("RGB")  # CMYK and others have no way to grey of their own
    return image.convert("L" if channels == 1 else "RGB")


def covering_size(size: tuple[int, int], preprocessing: dict) -> tuple[int, int]:
    """(width, height) to which a picture of `size` (width, height) is resized, so that image_size is just covered.

    Raises:
        BadImageError: a thin picture that would be enlarged to more pixels than Pillow would read.
    """
    height, width = preprocessing["image_size"]
    scale = max(height / size[1], width / size[0])
    covering = max(width, round(size[0] * scale)), max(height, round(size[1] * scale))
    limit = Image.MAX_IMAGE_PIXELS
    if scale > 1 and limit is not None and covering[0] * covering[1] > limit:
        raise BadImageError(
            f"to cover {width} x {height} pixels, its {size[0]} x {size[1]} would be enlarged to {covering[0]} x "
            f"{covering[1]}, of which at most {limit} are allowed; crop it, or raise PIL.Image.MAX_IMAGE_PIXELS"
        )
    return covering


def resize(image: Image.Image, preprocessing: dict) -> np.ndarray:
    """Resizes so that image_size is just covered; uint8 (C, h, w) with h >= H, w >= W, one of them equal."""
    image = to_mode(image, preprocessing["channels"])
    size = covering_size(image.size, preprocessing)
    if size != image.size:
        image = image.resize(size, Image.Resampling[preprocessing["resize_filter"].upper()])
    pixels = np.array(image)
    return pixels[None] if pixels.ndim == 2 else np.ascontiguousarray(pixels.transpose(2, 0, 1))


def crop(pixels: np.ndarray, size: Sequence[int], place: Callable[[int], int]) -> np.ndarray:
    """Cuts (C, H, W) out; `place` chooses the offset among 0..slack."""
    top, left = (place(have - want) for have, want in zip(pixels.shape[1:], size))
    return pixels[:, top : top + size[0], left : left + size[1]]


def pad(pixels: np.ndarray, width: int) -> np.ndarray:
    """Black on all sides; np.pad takes ten times as long on small images."""
    channels, height, columns = pixels.shape
    padded = np.zeros((channels, height + 2 * width, columns + 2 * width), dtype=np.uint8)
    padded[:, width : width + height, width : width + columns] = pixels
    return padded


def binarize(pixels: np.ndarray, preprocessing: dict) -> np.ndarray:
    """Deterministic binarisation of uint8 (C, H, W) to 0 and 255.

    The fixed draw is seeded by the pixels themselves, not by the image's number: a user's copy of the file gets the
    same one, and no noise pattern is shared by different images.
    """
    if preprocessing["binarize"] == "none":
        return pixels
    if preprocessing["binarize"] == "threshold":
        return np.where(pixels >= 128, np.uint8(255), np.uint8(0))
    seed = preprocessing["binarize_seed"].to_bytes(16, "little")
    content = hashlib.sha256(seed + str(pixels.shape).encode() + pixels.tobytes()).digest()
    generator = np.random.Generator(np.random.Philox(key=np.frombuffer(content[:16], dtype="<u8")))
    return draw_binary(pixels, generator)


def draw_binary(pixels: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """0 or 255, the latter with probability pixels / 255."""
    uniform = generator.random(pixels.shape, dtype=np.float32)
    return (uniform * 255 < pixels).view(np.uint8) * np.uint8(255)


def to_float(pixels: np.ndarray | Tensor) -> Tensor:
    return torch.as_tensor(pixels).float().div_(255)


def preprocess_image(image: Image.Image, preprocessing: dict) -> Tensor:
    """A user's image as the data set would give it: the deterministic view, float32 (C, H, W) in [0, 1].

    Args:
        image: of any mode and size.
        preprocessing: `ImageDataset.preprocessing`, which travels in the tokenizer's configuration.
    Raises:
        ValueError: `preprocessing` lacks an entry; the image's mode cannot be converted.
    """
    missing = {"image_size", "channels", "resize_filter", "crop", "binarize"} - preprocessing.keys()
    if missing:
        raise ValueError(
            f"preprocessing lacks {', '.join(sorted(missing))}: the tokenizer was saved without it; "
            f"give tensors of its image_shape in [0, 1] instead"
        )
    with naming_image("the image"):
        return to_float(binarize(center(resize(image, preprocessing), preprocessing), preprocessing))


def center(pixels: np.ndarray, preprocessing: dict) -> np.ndarray:
    return crop(pixels, preprocessing["image_size"], lambda slack: slack // 2)
