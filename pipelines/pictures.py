"""Pictures that a person looks at: grids of reconstructions and samples."""

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torch.utils.data import Dataset

from pipelines.batches import read_batch
from pipelines.files import atomic_file
from pipelines.labels import label_ids
from pipelines.scripting import check_writable
from prior.base import Prior, evaluating
from tokenizer.base import Tokenizer

SMALLEST_SIDE = 64  # smaller images are enlarged by whole factors, so that a person sees the pixels
PADDING = 2  # pixels between images
TEXT_HEIGHT = 16  # of a line of names


def save_grid(images: Tensor, path: Path, *, columns: int, column_names: Sequence[str] = ()) -> Path:
    """Writes (B, C, H, W) images in [0, 1] as one PNG, row by row, with names above the columns where there are any."""
    picture = grid_picture(images, columns, column_names)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as file:
        picture.save(file, format="PNG")
    return path


def grid_picture(images: Tensor, columns: int, column_names: Sequence[str] = ()) -> Image.Image:
    """The picture that `save_grid` writes."""
    from torchvision.transforms.functional import to_pil_image
    from torchvision.utils import make_grid

    images = images.detach().float().cpu().clamp(0, 1)
    factor = max(1, SMALLEST_SIDE // min(images.shape[-2:]))
    images = images.repeat_interleave(factor, dim=2).repeat_interleave(factor, dim=3)
    picture = to_pil_image(make_grid(images, nrow=columns, padding=PADDING, pad_value=0.5))
    return _with_header(picture, images.shape[-1] + PADDING, column_names) if column_names else picture


def _with_header(picture: Image.Image, column_width: int, names: Sequence[str]) -> Image.Image:
    """The picture with a line of names above it, each cut off where the next column begins."""
    whole = Image.new(picture.mode, (picture.width, picture.height + TEXT_HEIGHT), "white")
    whole.paste(picture, (0, TEXT_HEIGHT))
    font = _font("".join(names), TEXT_HEIGHT - 5)
    for column, name in enumerate(names):
        label = Image.new(picture.mode, (column_width - PADDING, TEXT_HEIGHT), "white")
        ImageDraw.Draw(label).text((0, 0), name, fill="black", font=font)
        whole.paste(label, (PADDING + column * column_width, 0))
    return whole


def _font(text: str, size: int) -> ImageFont.FreeTypeFont:
    """Pillow's own, which knows ASCII alone, or one of more letters where they are needed and there is one."""
    if not text.isascii():
        for name in ("DejaVuSans.ttf", "Arial.ttf", "arial.ttf"):  # of Linux, macOS, Windows
            with suppress(OSError):
                return ImageFont.truetype(name, size)
        with suppress(ImportError, OSError):
            import matplotlib

            return ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf", size)
    return ImageFont.load_default(size)


def check_picture(path: Path, columns: int = 1, suffix: str = ".png") -> None:
    """Raises ValueError where a picture could not be written, before the work on its images is done."""
    if columns < 1:
        raise ValueError(f"columns must be at least 1, got {columns}")
    if path.is_dir() or path.suffix.lower() != suffix:
        raise ValueError(
            f"the picture is written as {suffix[1:].upper()}, got '{path}'; name a file that ends in {suffix}"
        )
    check_writable(path)


def class_columns(pipeline, class_labels=None, rows: int = 8) -> tuple[list[int], list[str]]:
    """Labels, row by row, of a grid with a column for each class, and the columns' names.

    Args:
        class_labels: number, name, or a list of them; default all classes.
    Raises:
        ValueError: the prior has no classes, there are no rows, or an unknown class.
    """
    if pipeline.prior.num_classes == 0:
        raise ValueError("a grid of classes needs a class-conditional prior; this one has no classes")
    if rows < 1:
        raise ValueError(f"a grid of classes needs at least 1 image of each, got {rows}")
    if class_labels is None:
        class_labels = list(range(pipeline.prior.num_classes))
    labels = label_ids(class_labels if isinstance(class_labels, list) else [class_labels], pipeline.class_names)
    known = len(pipeline.class_names)
    return labels * rows, [pipeline.class_names[label] if 0 <= label < known else str(label) for label in labels]


def side_by_side(originals: Tensor, reconstructions: Tensor, columns: int) -> Tensor:
    """Rows of originals with the row of their reconstructions below each: (2B, C, H, W)."""
    rows = zip(originals.split(columns), reconstructions.split(columns))
    return torch.cat([part for pair in rows for part in pair])


@torch.no_grad()
def save_reconstructions(tokenizer: Tokenizer, images: Dataset, path: Path) -> Path:
    """Writes a grid of images taken evenly from the whole set, the reconstruction of each below it."""
    device = next(tokenizer.parameters()).device
    columns = min(16, len(images))
    count = min(32, len(images)) // columns * columns  # whole rows: each original above its reconstruction
    indices = torch.linspace(0, len(images) - 1, count).long().tolist()
    originals = read_batch(images, indices)["image"].to(device)
    with evaluating(tokenizer):
        reconstructions = tokenizer.decode(tokenizer.encode(originals))
    return save_grid(side_by_side(originals, reconstructions, columns), path, columns=columns)


@torch.no_grad()
def save_samples(
    prior: Prior, tokenizer: Tokenizer, path: Path, *, captions: Tensor | None = None, rows: int = 8
) -> Path:
    """Writes a grid of samples: one column per class or caption (at most 16 of them), or 8 columns without them.

    Args:
        captions: token ids (columns, max_text_length), of a prior that is conditional on captions.
    """
    columns = min(len(captions) if prior.conditional_on_text else prior.num_classes, 16) or 8
    labels = torch.arange(columns).repeat(rows) if prior.num_classes else None
    if prior.conditional_on_text:
        labels = captions[:columns].repeat(rows, 1)
    codes = prior.sample(rows * columns, labels, generator=torch.Generator().manual_seed(0))
    device = next(tokenizer.parameters()).device
    images = tokenizer.decode(tuple(code.to(device) for code in codes))
    return save_grid(images, path, columns=columns)
