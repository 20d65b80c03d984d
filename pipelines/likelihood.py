"""A bound on log p(x) of a tokenizer with a prior, in nats and bits/dim, split into what each part pays."""

import math

import torch
from torch import Tensor
from tqdm import tqdm

from pipelines.metrics import bits_per_dim
from prior.base import Codes, Prior

# Averaging a conditional prior over its classes costs one pass per class
MOST_CLASSES_TO_AVERAGE = 100


@torch.inference_mode()
def evaluate_likelihood(pipeline, dataset, *, batch_size: int = 128, progress: bool = True) -> dict[str, float]:
    """log p(x) >= log p(x | z) + log p(z) at z = encode(x), averaged over a data set.

    For a deterministic encoder this is the exact contribution of one z to p(x) = sum_z p(x | z) p(z), hence a bound.
    It holds for the discrete 8-bit pixels (or bits, where images are binarised), so bits/dim of all models compare.
    For a class-conditional prior, p(z) is the average over the classes, p(z) = 1/Y sum_y p(z | y).

    Returns:
        nats (of -log p(x)) and its parts: distortion_nats of p(x | z), rate_nats of p(z); bits_per_dim; standard
        errors of both (`_se`), where there is more than one image; prior_nats_per_code (given the class, where there
        is one); num_images.
    """
    tokenizer, prior, device = pipeline.tokenizer, pipeline.prior, pipeline.device
    columns: dict[str, list[Tensor]] = {"distortion": [], "rate": [], "conditional": []}
    starts = range(0, len(dataset), batch_size)
    for start in tqdm(starts, desc="likelihood", unit="batch", disable=None if progress else True):
        keys = list(range(start, min(start + batch_size, len(dataset))))
        batch = dataset.collate(dataset.__getitems__(keys))
        images = batch["image"].to(device)
        codes = tokenizer.encode(images.to(pipeline.dtype))
        conditional, marginal = prior_log_prob(prior, codes, batch["label"].to(device))
        columns["distortion"].append(tokenizer.nll(images, codes).double())
        columns["rate"].append(-marginal.double())
        columns["conditional"].append(-conditional.double())
    distortion, rate, conditional = (torch.cat(column) for column in columns.values())
    num_dims = math.prod(tokenizer.config.image_shape)
    nats, errors = (distortion + rate).mean().item(), {}
    if len(distortion) > 1:
        nats_se = standard_error(distortion + rate)
        errors = {"nats_se": nats_se, "bits_per_dim_se": bits_per_dim(nats_se, num_dims)}
    return {
        "nats": nats,
        "bits_per_dim": bits_per_dim(nats, num_dims),
        **errors,
        "distortion_nats": distortion.mean().item(),
        "rate_nats": rate.mean().item(),
        "prior_nats_per_code": conditional.mean().item() / prior.spec.length,
        "num_images": len(dataset),
    }


def prior_log_prob(prior: Prior, codes: Codes, labels: Tensor) -> tuple[Tensor, Tensor]:
    """(log p(z | label), log p(z)), each (B,); equal where the prior has no classes.

    Raises:
        ValueError: too many classes to average over.
    """
    if prior.num_classes == 0:
        log_prob = prior.log_prob(codes)
        return log_prob, log_prob
    if prior.num_classes > MOST_CLASSES_TO_AVERAGE:
        raise ValueError(
            f"log p(x) needs an average over the prior's {prior.num_classes} classes, at most "
            f"{MOST_CLASSES_TO_AVERAGE} are computed; train an unconditional prior for this number"
        )
    of_class = torch.stack([prior.log_prob(codes, torch.full_like(labels, y)) for y in range(prior.num_classes)])
    conditional = of_class.gather(0, labels[None])[0]
    return conditional, of_class.logsumexp(dim=0) - math.log(prior.num_classes)


def standard_error(values: Tensor) -> float:
    """Of the mean of independent values."""
    return values.std().item() / math.sqrt(len(values))
