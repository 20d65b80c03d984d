"""Pictures that a person looks at: grids of reconstructions and samples."""

from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset

from pipelines.files import atomic_file
from prior.base import Prior
from tokenizer.base import Tokenizer

SMALLEST_SIDE = 64  # smaller images are enlarged by whole factors, so that a person sees the pixels


def save_grid(images: Tensor, path: Path, *, columns: int) -> Path:
    """Writes (B, C, H, W) images in [0, 1] as one PNG, row by row."""
    from torchvision.transforms.functional import to_pil_image
    from torchvision.utils import make_grid

    images = images.detach().float().cpu().clamp(0, 1)
    factor = max(1, SMALLEST_SIDE // min(images.shape[-2:]))
    images = images.repeat_interleave(factor, dim=2).repeat_interleave(factor, dim=3)
    grid = make_grid(images, nrow=columns, padding=2, pad_value=0.5)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as file:
        to_pil_image(grid).save(file, format="PNG")
    return path


def check_picture(path: Path, columns: int) -> None:
    """Raises ValueError where `save_grid` could not write, before the work on its images is done."""
    if columns < 1:
        raise ValueError(f"columns must be at least 1, got {columns}")
    if path.is_dir() or path.suffix.lower() != ".png":
        raise ValueError(f"the picture is written as PNG, got '{path}'; name a file that ends in .png")


def side_by_side(originals: Tensor, reconstructions: Tensor, columns: int) -> Tensor:
    """Rows of originals with the row of their reconstructions below each: (2B, C, H, W)."""
    rows = zip(originals.split(columns), reconstructions.split(columns))
    return torch.cat([part for pair in rows for part in pair])


@torch.no_grad()
def save_reconstructions(tokenizer: Tokenizer, images: Dataset, path: Path, *, num_images: int = 32) -> Path:
    """Writes a grid of images taken evenly from the whole set, the reconstruction of each below it."""
    device = next(tokenizer.parameters()).device
    columns = min(16, len(images))
    count = min(num_images, len(images)) // columns * columns  # whole rows: each original above its reconstruction
    indices = torch.linspace(0, len(images) - 1, count).long().tolist()
    originals = images.collate(images.__getitems__(indices))["image"].to(device)
    training = tokenizer.training
    tokenizer.eval()
    reconstructions = tokenizer.decode(tokenizer.encode(originals))
    tokenizer.train(training)
    return save_grid(side_by_side(originals, reconstructions, columns), path, columns=columns)


@torch.no_grad()
def save_samples(prior: Prior, tokenizer: Tokenizer, path: Path, *, rows: int = 8, seed: int = 0) -> Path:
    """Writes a grid of samples: one column per class (at most 16 of them), or 8 columns without classes."""
    columns = min(prior.num_classes, 16) or 8
    labels = torch.arange(columns).repeat(rows) if prior.num_classes else None
    generator = torch.Generator().manual_seed(seed)
    codes = prior.sample(rows * columns, labels, generator=generator)
    device = next(tokenizer.parameters()).device
    images = tokenizer.decode(tuple(code.to(device) for code in codes))
    return save_grid(images, path, columns=columns)
