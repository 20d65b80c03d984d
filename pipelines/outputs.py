"""Images in the form that a caller asks for."""

import numpy as np
from PIL import Image
from torch import Tensor

OUTPUT_TYPES = ("pil", "np", "pt", "codes")


def check_output_type(output_type: str) -> None:
    if output_type not in OUTPUT_TYPES:
        raise ValueError(f"unknown output_type '{output_type}' (known: {', '.join(OUTPUT_TYPES)})")


def as_output_type(images: Tensor, output_type: str):
    images = images.float().cpu()
    if output_type == "codes":
        raise ValueError("output_type 'codes' is for sampling")
    if output_type == "pt":
        return images
    arrays = images.permute(0, 2, 3, 1).numpy()
    return arrays if output_type == "np" else to_pil(arrays)


def to_pil(arrays: np.ndarray) -> list[Image.Image]:
    """(B, H, W, C) in [0, 1] -> 8-bit images, C = 1 or 3."""
    bytes_ = (arrays * 255).round().astype(np.uint8)
    return [Image.fromarray(array[:, :, 0] if array.shape[2] == 1 else array) for array in bytes_]
