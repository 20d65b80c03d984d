"""Regions of images, as masks of pixels and of the codes that stand for them. True is what is to be filled.

Letters: B images, C channels, H W height and width in pixels, h w of a map of codes.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from pipelines.image_sources import readable_formats
from pipelines.preprocessing import center, covering_size, in_eight_bits, load, naming_image, to_mode, upright
from tokenizer.base import Tokenizer

HALVES = ("top", "bottom", "left", "right")
WHITE = 128  # of 255: pixels of a mask image at least as bright are to be filled


def as_mask(mask, num_images: int, tokenizer: Tokenizer) -> Tensor:
    """(B, 1, H, W) boolean, True where pixels are to be filled.

    Args:
        mask: boolean tensor or array, (H, W) for all images or (B, 1, H, W); or a mask image for all or one per image,
            white where pixels are to be filled, which is turned upright, resized and cropped as images are; a pixel
            that it only touches counts as filled.
        tokenizer: whose image_shape and preprocessing are meant.
    Raises:
        ValueError: another shape or dtype, or a mask image that marks no pixel.
    """
    height, width = tokenizer.config.image_shape[1:]
    pictures = [mask] if isinstance(mask, Image.Image) else mask
    if isinstance(pictures, Sequence) and pictures and all(isinstance(part, Image.Image) for part in pictures):
        if len(pictures) not in (1, num_images):
            raise ValueError(f"got {len(pictures)} mask images for {num_images} images: give one, or one each")
        preprocessing = {"image_size": (height, width), **tokenizer.config.preprocessing}
        mask = torch.stack([_from_picture(part, preprocessing) for part in pictures])
        return mask.expand(num_images, -1, -1, -1)
    if not isinstance(mask, (Tensor, np.ndarray)):
        raise ValueError(f"mask must be a boolean tensor or array, or mask images, got {type(mask).__name__}")
    mask = torch.as_tensor(mask)
    if mask.dtype != torch.bool or tuple(mask.shape) not in {(height, width), (num_images, 1, height, width)}:
        raise ValueError(
            f"mask must be boolean (True: to be filled) of shape ({height}, {width}), or "
            f"({num_images}, 1, {height}, {width}), got {mask.dtype} of shape {tuple(mask.shape)}"
        )
    return mask.expand(num_images, 1, height, width)


def check_mask_sizes(mask, images) -> None:
    """Raises ValueError for a mask image that is not as large as its image: they would be cropped differently.

    Both are compared upright, as people see them.
    """
    masks, images = ([x] if isinstance(x, Image.Image) else x for x in (mask, images))
    if not all(isinstance(x, Sequence) and all(isinstance(part, Image.Image) for part in x) for x in (masks, images)):
        return
    for part, image in zip(masks if len(masks) > 1 else [*masks] * len(images), images):
        with naming_image("the mask"):
            width, height = upright(part).size
        with naming_image("the image"):
            expected = upright(image).size
        if (width, height) != expected:
            raise ValueError(
                f"a mask image must be as large as its image, got {width} x {height} for an image of "
                f"{expected[0]} x {expected[1]} (width x height)"
            )


def _from_picture(picture: Image.Image, preprocessing: dict) -> Tensor:
    """(1, H, W): the picture resized and cropped as an image would be."""
    with naming_image("the mask"):
        grey = np.asarray(in_eight_bits(picture).convert("L"))
        width, height = covering_size(grey.shape[::-1], preprocessing)
    touched = _touched(_touched(grey >= WHITE, height).T, width).T
    filled = center(touched[None], preprocessing)
    if not filled.any():
        raise ValueError(
            f"the mask marks no pixel that is left after cropping: white (255 of 8 bits, 65535 of 16) marks what is to "
            f"be filled, and its brightest pixel is {grey.max()} of 255"
        )
    return torch.from_numpy(filled.copy())


def _touched(marked: np.ndarray, size: int) -> np.ndarray:
    """(size, W) from (H, W), boolean: rows of a resized picture that a marked one overlaps by however little."""
    # Not Pillow's box filter, which leaves out what overlaps by less than half a pixel
    before = np.concatenate([np.zeros_like(marked[:1], dtype=int), np.cumsum(marked, axis=0)])
    edges = np.arange(size + 1) * len(marked)
    return before[-(-edges[1:] // size)] > before[edges[:-1] // size]


def hide(images, mask, tokenizer: Tokenizer):
    """Images of which nothing under the mask is left: what resizing makes of pixels beside it depends on it else.

    Pictures with mask pictures, where they are resized, hold the nearest visible pixel there, grey if there is none.
    All others are given back as they are: their masks are of prepared images.
    """
    pictures, masks = ([x] if isinstance(x, Image.Image) else x for x in (images, mask))
    if any(isinstance(x, (Tensor, np.ndarray)) for x in (pictures, masks)):
        return images
    preprocessing = tokenizer.config.preprocessing
    masks = [*masks] * len(pictures) if len(masks) == 1 else masks
    return [_hidden(picture, part, preprocessing) for picture, part in zip(pictures, masks, strict=True)]


def _hidden(picture: Image.Image, mask: Image.Image, preprocessing: dict) -> Image.Image:
    from scipy import ndimage  # half a second to import

    with naming_image("the image"):
        picture = to_mode(picture, preprocessing["channels"])
        if covering_size(picture.size, preprocessing) == picture.size:
            return picture
    with naming_image("the mask"):
        marked = np.asarray(in_eight_bits(mask).convert("L")) >= WHITE
    pixels = np.array(picture)
    if marked.all():
        pixels[:] = 128
    elif marked.any():
        nearest = ndimage.distance_transform_edt(marked, return_distances=False, return_indices=True)
        pixels = pixels[tuple(nearest)]
    return Image.fromarray(pixels)


def code_masks(mask: Tensor, tokenizer: Tokenizer) -> tuple[tuple[Tensor, ...], Tensor]:
    """The codes (B, h, w) of each level that must be drawn anew to fill a mask (B, 1, H, W), and their region.

    The mask is rounded outwards: a code counts as soon as the mask touches one pixel of its place (see
    `Tokenizer.code_strides`), and with it all finer codes there, because a finer code says what the coarser one lacks.
    Both networks see more than a code's own place, some pixels around it; codes outside the region are kept although
    the pixels they were computed from may lie inside, and their pixels may change a little although they are kept.

    Returns:
        a boolean mask per level, and the region (B, 1, H, W): the pixels whose codes are drawn.
    Raises:
        ValueError: the tokenizer's codes have no place in the image.
    """
    check_geometry(tokenizer)
    height, width = mask.shape[-2:]
    masks, region = [], mask
    for (rows, columns), stride in zip(tokenizer.spec.shapes, tokenizer.code_strides):
        # the last row and column of the maps may reach beyond the image, which the encoder continues there
        padded = F.pad(region.float(), (0, columns * stride - width, 0, rows * stride - height), mode="replicate")
        codes = F.max_pool2d(padded, stride) > 0
        masks.append(codes[:, 0])
        region = codes.repeat_interleave(stride, dim=2).repeat_interleave(stride, dim=3)[..., :height, :width]
    return tuple(masks), region


def check_geometry(tokenizer: Tokenizer) -> None:
    """Raises ValueError unless every code has a place in the image."""
    if tokenizer.code_strides is None:
        shapes = ", ".join(str(shape) for shape in tokenizer.spec.shapes)
        raise ValueError(
            f"the codes of {type(tokenizer).__name__} (of shape {shapes}) describe the image as a whole and have no "
            "place in it, so a region cannot be filled; take a tokenizer with maps of codes, such as vqvae or vqvae2"
        )


def fill_from_around(images: Tensor, mask: Tensor) -> Tensor:
    """Images (B, C, H, W) whose masked pixels are replaced by averages of those around them, from the edge inwards.

    Whatever they held, the result is the same. An image that is masked altogether becomes grey.
    """
    altogether = mask.flatten(1).all(dim=1)[:, None, None, None]
    known = (~mask | altogether).float()
    # filled, not multiplied: what is masked may be anything, not-a-number included
    values = images.masked_fill(mask, 0.0).masked_fill(altogether, 0.5)
    while (known == 0).any():
        weights = F.avg_pool2d(known, 3, stride=1, padding=1)
        means = F.avg_pool2d(values * known, 3, stride=1, padding=1) / weights.clamp(min=1 / 9)
        reached = (known == 0) & (weights > 0)
        values = torch.where(reached, means, values)
        known = known + reached
    return values


def named_mask(mask: str | Sequence[int], tokenizer: Tokenizer) -> Tensor | Image.Image:
    """A mask as a user writes it, for `as_mask`.

    Args:
        mask: "top", "bottom", "left" or "right", for that half; (top, left, bottom, right) in pixels of the prepared
            image, the last two not included; or the path of a mask image, white where pixels are to be filled.
    Raises:
        ValueError: a box that does not lie in the image, or a file that is no image.
    """
    height, width = tokenizer.config.image_shape[1:]
    if isinstance(mask, str) and mask not in HALVES:
        if not Path(mask).is_file():
            raise ValueError(f"there is no file '{mask}'; a mask is one of {', '.join(HALVES)}, a box, or an image")
        return open_image(mask)
    halves = {
        "top": (0, 0, height // 2, width),
        "bottom": (height // 2, 0, height, width),
        "left": (0, 0, height, width // 2),
        "right": (0, width // 2, height, width),
    }
    box = halves[mask] if isinstance(mask, str) else tuple(mask)
    if len(box) != 4 or not (0 <= box[0] < box[2] <= height and 0 <= box[1] < box[3] <= width):
        raise ValueError(
            f"a mask is one of {', '.join(HALVES)}, the path of an image, or a box (top, left, bottom, right) within "
            f"the {height} x {width} pixels, got {mask}"
        )
    filled = torch.zeros(height, width, dtype=torch.bool)
    filled[box[0] : box[2], box[1] : box[3]] = True
    return filled


def open_image(path: str) -> Image.Image:
    """A picture from a file, decoded. Raises ValueError naming the file where it is none, or of a refused format."""
    with naming_image(path):
        picture = Image.open(path, formats=readable_formats())
        load(picture)
    return picture
