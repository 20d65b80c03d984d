"""A bound on log p(x) of a tokenizer with a prior, in nats and bits/dim, split into what each part pays.

Letters: k draws of the codes z of an image.
"""

import math
from contextlib import suppress
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from pipelines.batches import read_batch
from pipelines.metrics import NotMeasurableError, bits_per_dim
from pipelines.seeding import own_randomness
from prior.base import Codes, Prior
from prior.rbm import check_sizes

# Averaging a conditional prior over its classes costs one pass per class
MOST_CLASSES_TO_AVERAGE = 100


class LogLikelihoods(NamedTuple):
    """Of each image, (N,) float64 on the CPU, in nats.

    bound: log mean over k draws of w = p(x | z) p(z) / q(z | x); elbo: mean of log w; distortion: mean of
    -log p(x | z); rate: mean of log q(z | x) - log p(z), so that elbo = -distortion - rate; conditional: mean of
    log p(z | label), log p(z) for a prior without classes, NaN where the labels are not the prior's.
    """

    bound: Tensor
    elbo: Tensor
    distortion: Tensor
    rate: Tensor
    conditional: Tensor


def evaluate_likelihood(
    pipeline, dataset, *, num_draws: int = 1, batch_size: int = 128, seed: int = 0, progress: bool = True
) -> dict[str, float]:
    """log p(x) >= E log 1/k sum of p(x | z) p(z) / q(z | x) over k draws z ~ q(z | x), averaged over a data set.

    This is the importance-weighted bound (Burda et al. 2016, arXiv:1509.00519, Eq. 8): it grows with k, towards
    log p(x). A deterministic encoder has one z, for which it is the exact contribution of that z to
    p(x) = sum_z p(x | z) p(z), whatever k. It holds for the discrete 8-bit pixels (or bits, where images are
    binarised), so bits/dim of all models compare. For a class-conditional prior, p(z) is the average over the classes,
    p(z) = 1/Y sum_y p(z | y).

    Args:
        pipeline: a `Pipeline`.
        dataset: images, as of `load_images`.
        num_draws: k.
        batch_size: images computed at a time; k does not change the memory.
        seed: of the draws. The same seed and batch size give the same numbers; torch's own generators are left alone.
        progress: whether a terminal shows a bar.
    Returns:
        see `likelihood_metrics`.
    Raises:
        ValueError: num_draws or batch_size below 1.
        NotMeasurableError: log p(z) is not known: captions, too many classes, or a log Z whose estimates disagree.
    """
    values = log_likelihoods(
        pipeline, dataset, num_draws=num_draws, batch_size=batch_size, seed=seed, progress=progress
    )
    return likelihood_metrics(pipeline, values, num_draws=num_draws)


def likelihood_metrics(pipeline, values: LogLikelihoods, *, num_draws: int) -> dict[str, float]:
    """Means over a data set of its `log_likelihoods`, by num_draws draws where the encoder is stochastic.

    Returns:
        nats (of the bound on -log p(x)) and bits_per_dim; negative_elbo_nats, which is their value for k = 1, and its
        parts, means under q: distortion_nats of p(x | z), rate_nats of q(z | x) against p(z), the KL divergence;
        standard errors over images (`_se`), where there is more than one; prior_nats_per_code (given the class, where
        there is one; NaN where `prior_labels` raises) for codes that are integers; num_draws made; num_images. A
        standard error does not hold what is unknown of log Z.
    """
    num_dims, num_images = math.prod(pipeline.tokenizer.config.image_shape), len(values.bound)
    nats, errors = -values.bound.mean().item(), {}
    if num_images > 1:
        nats_se = standard_error(values.bound)
        errors = {"nats_se": nats_se, "bits_per_dim_se": bits_per_dim(nats_se, num_dims)}
        errors["negative_elbo_nats_se"] = standard_error(values.elbo)
    spec, of_codes = pipeline.prior.spec, {}
    if spec.is_discrete:
        of_codes = {"prior_nats_per_code": -values.conditional.mean().item() / spec.length}
    return {
        "nats": nats,
        "bits_per_dim": bits_per_dim(nats, num_dims),
        "negative_elbo_nats": -values.elbo.mean().item(),
        **errors,
        "distortion_nats": values.distortion.mean().item(),
        "rate_nats": values.rate.mean().item(),
        **of_codes,
        "num_draws": num_draws if pipeline.tokenizer.is_stochastic else 1,
        "num_images": num_images,
    }


@torch.inference_mode()
def log_likelihoods(
    pipeline, dataset, *, num_draws: int = 1, batch_size: int = 128, seed: int = 0, progress: bool = True
) -> LogLikelihoods:
    """The bound and its parts for each image; see `evaluate_likelihood`."""
    for name, value in (("num_draws", num_draws), ("batch_size", batch_size)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    check_prior(pipeline.prior, progress)
    num_draws = num_draws if pipeline.tokenizer.is_stochastic else 1
    label_of = None
    with suppress(NotMeasurableError):  # p(z), the average over all classes, needs no labels
        label_of = prior_labels(pipeline, dataset)
    starts = range(0, len(dataset), batch_size)
    parts = []
    with (
        own_randomness(seed, pipeline.device),
        tqdm(total=len(starts) * num_draws, desc="likelihood", unit="pass", disable=None if progress else True) as bar,
    ):
        for start in starts:
            batch = read_batch(dataset, range(start, min(start + batch_size, len(dataset))))
            labels = None if label_of is None else label_of[batch["label"]]
            parts.append(_of_batch(pipeline, batch["image"], labels, num_draws, bar.update))
    return LogLikelihoods(*(torch.cat(column) for column in zip(*parts)))


def _of_batch(pipeline, images: Tensor, labels: Tensor | None, num_draws: int, advance) -> LogLikelihoods:
    tokenizer, device, dtype = pipeline.tokenizer, pipeline.device, pipeline.dtype
    images, labels = images.to(device), None if labels is None else labels.to(device)
    # The images stay in float32: the 256 values of a pixel do not fit into the numbers of bfloat16
    half = dtype in (torch.bfloat16, torch.float16)
    log_sum = torch.full((len(images),), -math.inf, dtype=torch.float64)
    totals = torch.zeros(4, len(images), dtype=torch.float64)
    draws = tokenizer.draw_posteriors(images if half else images.to(dtype), num_draws)
    for _ in range(num_draws):
        with torch.autocast(device.type, dtype if half else None, enabled=half):
            draw = next(draws)
        parts = (draw.log_likelihood, draw.log_q, *prior_log_prob(pipeline.prior, draw.codes, labels))
        log_likelihood, log_q, conditional, marginal = (part.cpu().double() for part in parts)
        rate = log_q - marginal
        log_weight = log_likelihood - rate
        log_sum = torch.logaddexp(log_sum, log_weight)
        totals += torch.stack([log_weight, -log_likelihood, rate, conditional])
        advance()
    return LogLikelihoods(log_sum - math.log(num_draws), *(totals / num_draws))


def check_prior(prior: Prior, progress: bool = True) -> None:
    """Raises NotMeasurableError where log p(z) cannot be had; estimates log Z for it, with a bar if `progress`."""
    if prior.conditional_on_text:
        raise NotMeasurableError(
            "log p(x) needs p(z), but this prior is conditional on captions and an average over all captions cannot be "
            "computed; train an unconditional prior for this number"
        )
    if prior.num_classes > MOST_CLASSES_TO_AVERAGE:
        raise NotMeasurableError(
            f"log p(x) needs an average over the prior's {prior.num_classes} classes, at most "
            f"{MOST_CLASSES_TO_AVERAGE} are computed; train an unconditional prior for this number"
        )
    if hasattr(prior, "log_partition"):
        options = {"desc": "log Z", "unit": "temperature", "disable": None if progress else True}
        with tqdm(delay=1, **options) as bar:  # sums take no time

            def advance(done: int, total: int) -> None:
                bar.total = total
                bar.update(done - bar.n)

            try:
                prior.log_partition(advance).require()
            except ValueError as error:
                raise NotMeasurableError(str(error)) from error


def prior_labels(pipeline, dataset) -> Tensor | None:
    """The prior's label of each of a data set's labels, whose classes need not be all and in the order of training.

    Returns:
        (number of the data's classes,) int64, by the classes' names; None for a prior without classes.
    Raises:
        NotMeasurableError: a class that the prior does not know, or classes without names.
    """
    if pipeline.prior.num_classes == 0:
        return None
    known, names = pipeline.class_names, getattr(dataset, "class_names", ())  # noise has none
    if len(known) != pipeline.prior.num_classes or not names:
        lacking = "this pipeline has" if names else "these images have"
        raise NotMeasurableError(f"log p(codes | class) needs to know classes by their names, and {lacking} none")
    if names == known:
        return torch.arange(len(names))
    if unknown := [name for name in names if name not in known]:
        raise NotMeasurableError(
            f"log p(codes | class) needs images of the prior's classes ({_listed(known)}), which {_listed(unknown)} "
            "are not"
        )
    return torch.tensor([known.index(name) for name in names])


def _listed(names: list[str]) -> str:
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")


def log_partition_metrics(prior: Prior) -> dict[str, float]:
    """What is known of log Z of a Boltzmann prior, in nats; empty for other priors.

    log_partition; unless it is exact, log_partition_se (of the estimate from below, from the spread of its importance
    weights), log_partition_lower and _upper (estimates that err to either side) and log_partition_ess, the effective
    sample size of the weights.
    """
    if not hasattr(prior, "log_partition"):
        return {}
    partition = prior.log_partition()
    if partition.exact:
        return {"log_partition": partition.value}
    return {
        "log_partition": partition.value,
        "log_partition_se": partition.standard_error,
        "log_partition_lower": partition.lower,
        "log_partition_upper": partition.upper,
        "log_partition_ess": partition.effective_sample_size,
    }


def set_ais_sizes(prior: Prior, **sizes: int | None) -> None:
    """Sets ais_temperatures and ais_chains of a prior's estimate of log Z, those that are not None.

    Raises:
        ValueError: a size below its least, or a prior whose log Z is not estimated.
    """
    given = {name: size for name, size in sizes.items() if size is not None}
    if given and not getattr(prior, "estimates_log_partition", False):
        raise ValueError(
            f"{' and '.join(given)} set the size of an estimate of log Z, and this {type(prior).__name__} makes none; "
            "leave it out"
        )
    for name, size in given.items():
        setattr(prior, name, size)
    if given:
        check_sizes(prior)


def prior_log_prob(prior: Prior, codes: Codes, labels: Tensor | None) -> tuple[Tensor, Tensor]:
    """(log p(z | label), log p(z)), each (B,); equal where the prior has no classes, else NaN first without labels."""
    if prior.num_classes == 0:
        log_prob = prior.log_prob(codes)
        return log_prob, log_prob
    zeros = torch.zeros(len(codes[0]), dtype=torch.int64, device=codes[0].device)
    of_class = torch.stack([prior.log_prob(codes, zeros + y) for y in range(prior.num_classes)])
    marginal = of_class.logsumexp(dim=0) - math.log(prior.num_classes)
    conditional = torch.full_like(marginal, math.nan) if labels is None else of_class.gather(0, labels[None])[0]
    return conditional, marginal


def standard_error(values: Tensor) -> float:
    """Of the mean of independent values."""
    return values.std().item() / math.sqrt(len(values))
