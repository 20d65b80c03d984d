"""Everything that is measured of a pipeline on held-out images, as one flat dict."""

import torch
from tqdm import tqdm

from pipelines.likelihood import evaluate_likelihood
from pipelines.metrics import CodeCounts, psnr


@torch.inference_mode()
def evaluate_pipeline(pipeline, images, *, batch_size: int = 128) -> dict[str, float]:
    """Reconstruction, codebook use and likelihood on a data set.

    Returns:
        psnr (dB, mean over images), mse; codebook_usage and perplexity (by level where there are several); what
        `evaluate_likelihood` returns, with uniform_nats_per_code, which a prior must beat, beside prior_nats_per_code.
    Raises:
        ValueError: batch_size is below 1.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    tokenizer = pipeline.tokenizer
    counts = CodeCounts(tokenizer.spec).to(pipeline.device)
    psnrs, squares = [], []
    for start in tqdm(range(0, len(images), batch_size), desc="reconstruction", unit="batch", disable=None):
        keys = list(range(start, min(start + batch_size, len(images))))
        originals = images.collate(images.__getitems__(keys))["image"].to(pipeline.device)
        codes = tokenizer.encode(originals)
        reconstructions = tokenizer.decode(codes)
        counts.add(codes)
        psnrs.append(psnr(reconstructions, originals))
        squares.append((reconstructions - originals).square().flatten(1).mean(dim=1))
    counts.merge()
    return {
        "psnr": torch.cat(psnrs).mean().item(),
        "mse": torch.cat(squares).mean().item(),
        **counts.summary(),
        "uniform_nats_per_code": tokenizer.spec.max_nats / tokenizer.spec.length,
        **evaluate_likelihood(pipeline, images, batch_size=batch_size),
    }


def format_table(metrics: dict[str, float]) -> str:
    """Two aligned columns for a terminal."""
    width = max(map(len, metrics))
    return "\n".join(
        f"{name:<{width}}  {value:.5g}" if isinstance(value, float) else f"{name:<{width}}  {value}"
        for name, value in metrics.items()
    )
