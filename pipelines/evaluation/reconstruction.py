"""One pass over a data set: images encoded and decoded again, how near they come, and which codes occurred where."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pipelines.batches import derived_seed
from pipelines.evaluation.features import FeatureNetwork, batches
from pipelines.evaluation.pretrained import SMALLEST_LPIPS_SIDE
from pipelines.metrics import CodeCounts, NotMeasurableError, psnr, squared_error
from prior.base import Codes
from prior.float64 import in_float64

SSIM_WINDOW = 11
SSIM_PIXELS = 2**18  # compared at a time: windows take 11 times their memory
# Entries of a level's table of positions and codes: half a gigabyte
MOST_ENTRIES = 2**26


@dataclass(frozen=True)
class Reconstructions:
    """What is left of a data set after encoding (the mode of q(z | x)) and decoding.

    values: by metric (psnr, mse, and ssim and lpips where they can be had), (N,) float64, one per image. counts: how
    often each code occurred. position_counts: of each level (positions, K), how often each code occurred at each
    position, or None where the table is too large or codes are real numbers. features: (N, F), or None without a
    network. not_measured: why a metric is missing.
    """

    values: dict[str, Tensor]
    counts: CodeCounts
    position_counts: list[Tensor | None]
    features: Tensor | None
    not_measured: dict[str, str]


@torch.inference_mode()
def reconstruct(
    pipeline,
    images,
    *,
    network: FeatureNetwork | None = None,
    lpips_network: nn.Module | None = None,
    batch_size: int = 128,
    seed: int = 0,
) -> Reconstructions:
    """Encodes and decodes a data set.

    Args:
        pipeline: a `Pipeline`.
        images: as of `load_images`.
        network: computes features of the reconstructions.
        lpips_network: see `pretrained.lpips_network`; None leaves lpips out.
        batch_size: images computed at a time.
        seed: for decoders with latents of their own.
    """
    tokenizer, spec = pipeline.tokenizer, pipeline.tokenizer.spec
    measures: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"psnr": psnr, "mse": squared_error, "ssim": ssim}
    if lpips_network is not None:
        measures["lpips"] = lambda images, targets: lpips(lpips_network, images, targets)
    columns: dict[str, list[Tensor]] = {}
    features, not_measured = [], {}
    counts = CodeCounts(spec).to(pipeline.device)
    tables = [
        None if size is None or length * size > MOST_ENTRIES else torch.zeros(length, size, dtype=torch.int64)
        for length, size in zip(spec.lengths, spec.vocab_sizes)
    ]
    for number, batch in enumerate(batches(images, batch_size, "reconstruction")):
        originals = batch.to(pipeline.device)
        codes = tokenizer.encode(originals.to(pipeline.dtype))
        generator = torch.Generator().manual_seed(derived_seed(seed, "reconstruction", number))
        decoded = tokenizer.decode(codes, generator).float()
        counts.add(codes)
        count_positions(tables, codes)
        for name, measure in list(measures.items()):
            try:
                columns.setdefault(name, []).append(measure(decoded, originals).cpu())
            except NotMeasurableError as error:
                not_measured[name] = str(error)
                del measures[name], columns[name]
        if network is not None:
            features.append(network(decoded)[0])
    counts.merge()
    values = {name: torch.cat(column).double() for name, column in columns.items()}
    return Reconstructions(values, counts, tables, torch.cat(features) if features else None, not_measured)


def count_positions(tables: list[Tensor | None], codes: Codes) -> None:
    """Adds codes to tables (positions, K) of each level, in place."""
    for table, code in zip(tables, codes):
        if table is not None:
            entries = code.flatten(1).cpu() + torch.arange(len(table)) * table.shape[1]
            table.view(-1).index_add_(0, entries.flatten(), torch.ones_like(entries).flatten())


def ssim(images: Tensor, targets: Tensor) -> Tensor:
    """Structural similarity of each image (Wang et al. 2004, eq. 13), (B,), for images in [0, 1].

    The mean over channels and over all Gaussian windows of deviation 1.5 that lie within the image, as in the authors'
    code and scikit-image's `structural_similarity(..., gaussian_weights=True, use_sample_covariance=False)`;
    torchmetrics also counts windows that reach beyond the image. In float64: variances are small differences.

    Raises:
        NotMeasurableError: images smaller than the window.
    """
    side = min(images.shape[2:])
    if side < SSIM_WINDOW:
        raise NotMeasurableError(
            f"SSIM compares windows of {SSIM_WINDOW} x {SSIM_WINDOW} pixels, these images have a side of {side}"
        )
    few = max(1, SSIM_PIXELS // images[0].numel())
    parts = zip(in_float64(images).split(few), in_float64(targets).split(few))
    return torch.cat([_similarity(x, y).flatten(1).mean(dim=1) for x, y in parts]).float()


def _similarity(x: Tensor, y: Tensor) -> Tensor:
    """Of each window within images (B, C, H, W): (B, C, H - 10, W - 10)."""
    offsets = torch.arange(SSIM_WINDOW, dtype=x.dtype, device=x.device) - SSIM_WINDOW // 2
    weights = torch.softmax(-offsets.square() / (2 * 1.5**2), dim=0)
    moments = torch.stack([x, y, x * x, y * y, x * y])
    for dim in (-2, -1):
        moments = moments.unfold(dim, SSIM_WINDOW, 1) @ weights
    mean_x, mean_y, square_x, square_y, product = moments
    luminance = (2 * mean_x * mean_y + 0.01**2) / (mean_x**2 + mean_y**2 + 0.01**2)
    variances = square_x - mean_x**2 + square_y - mean_y**2
    return luminance * (2 * (product - mean_x * mean_y) + 0.03**2) / (variances + 0.03**2)


def lpips(network: nn.Module, images: Tensor, targets: Tensor) -> Tensor:
    """Distance of each image, (B,), for images (B, 1 or 3, H, W) in [0, 1]; see `pretrained.lpips_network`.

    Raises:
        NotMeasurableError: images that are too small for AlexNet.
    """
    side = min(images.shape[2:])
    if side < SMALLEST_LPIPS_SIDE:
        raise NotMeasurableError(
            f"LPIPS with AlexNet needs images of at least {SMALLEST_LPIPS_SIDE} pixels, these have a side of {side}"
        )
    images, targets = (2 * part.float().expand(-1, 3, -1, -1) - 1 for part in (images, targets))
    return network(images, targets).flatten()
