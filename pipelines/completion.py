"""Filling a region of images: any mask, several candidates, ranked or re-weighted by the prior's own likelihood."""

from numbers import Integral
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from pipelines.checkpoint import uncompiled
from pipelines.drawing import decode_codes, draw_codes, encode_images, one_generator_each
from pipelines.masks import code_masks, fill_from_around
from prior.base import Codes, Prior
from prior.sampling import ImageNoise

Ranking = Literal["log_prob", "importance"]


class Completions(NamedTuple):
    """What `Pipeline.complete` returns, for B images with R candidates each, in the order of their ranking.

    images: B R images as output_type says, candidate r of image i at i R + r; codes: one int64 tensor (B R, *shape) per
    level, in the same order; log_prob: (B, R) log p(codes | label) in nats, by the prior itself, without sampling
    options, over known and drawn codes alike; weights: (B, R) importance weights that sum to one over the candidates,
    None unless ranking = "importance"; class_labels: (B, R), or None; region: (B, 1, H, W) boolean, the pixels whose
    codes were drawn: the mask, rounded outwards.
    """

    images: object
    codes: Codes
    log_prob: Tensor
    weights: Tensor | None
    class_labels: Tensor | None
    region: Tensor


def check_candidates(num_candidates: int, ranking: str, batch_size: int) -> None:
    """Raises ValueError for numbers below 1 or not whole, and an unknown ranking."""
    for name, number in (("num_candidates", num_candidates), ("batch_size", batch_size)):
        if not isinstance(number, Integral):
            raise ValueError(f"{name} must be an integer, got {number!r}")
    if num_candidates < 1 or batch_size < 1:
        raise ValueError(f"num_candidates and batch_size must be at least 1, got {num_candidates} and {batch_size}")
    if ranking not in get_args(Ranking):
        raise ValueError(f"unknown ranking {ranking!r}; choose from {', '.join(get_args(Ranking))}")


def check_weighable(prior: Prior, otherwise: str) -> None:
    """Raises ValueError, with what to do otherwise, for a prior under which candidates have no importance weights."""
    prior = uncompiled(prior)
    if type(prior).log_prob_by_code is Prior.log_prob_by_code:
        raise ValueError(
            f"{type(prior).__name__} does not predict one code after another, so that candidates have no importance "
            f"weights; {otherwise}"
        )


def candidate_generators(generators: list[torch.Generator], num_candidates: int) -> list[torch.Generator]:
    """num_candidates generators for each image, image by image, which depend on the image's own alone."""
    return [g for generator in generators for g in one_generator_each(num_candidates, generator)]


@torch.no_grad()
def complete(
    pipeline,
    images: Tensor,
    mask: Tensor,
    labels: Tensor | None,
    generators: list[torch.Generator],
    *,
    ranking: Ranking,
    keep_known_pixels: bool,
    batch_size: int,
    **options,
) -> Completions:
    """`Pipeline.complete` of checked inputs, with images as tensors (B R, C, H, W).

    Args:
        images: (B, C, H, W) in [0, 1].
        mask: (B, 1, H, W) boolean, True where pixels are to be filled.
        labels: what the prior is conditional on, for each of the B R candidates.
        generators: one for each of the B R candidates.
    """
    tokenizer, num_candidates = pipeline.tokenizer, len(generators) // len(images)
    unknown, region = code_masks(mask, tokenizer)
    codes = encode_images(tokenizer, fill_from_around(images, mask).to(pipeline.dtype), batch_size=batch_size)
    known = tuple(level.logical_not().repeat_interleave(num_candidates, dim=0) for level in unknown)
    given = (tuple(level.repeat_interleave(num_candidates, dim=0) for level in codes), known)
    drawn, _ = draw_codes(
        pipeline, labels, generators, batch_size=batch_size, progress="completing", given=given, **options
    )
    log_prob, log_weights = likelihoods(pipeline.prior, drawn, known, labels, ranking, batch_size)
    scores = log_prob if ranking == "log_prob" else log_weights + gumbel_noise(generators, log_weights.device)
    order = scores.unflatten(0, (-1, num_candidates)).argsort(dim=1, descending=True, stable=True)
    flat = (order + num_candidates * torch.arange(len(order), device=order.device)[:, None]).flatten()
    drawn = tuple(level[flat] for level in drawn)
    filled = decode_codes(tokenizer, drawn, [generators[i] for i in flat.tolist()], batch_size=batch_size).float()
    if keep_known_pixels:
        originals, hidden = (x.repeat_interleave(num_candidates, dim=0) for x in (images, mask))
        filled = torch.where(hidden, filled, originals.float())
    log_prob, log_weights, class_labels = (
        None if x is None else x.to(flat.device)[flat].unflatten(0, order.shape)
        for x in (log_prob, log_weights, None if pipeline.prior.conditional_on_text else labels)
    )
    weights = None if log_weights is None else log_weights.softmax(dim=1)
    return Completions(filled, drawn, log_prob, weights, class_labels, region)


@torch.no_grad()
def likelihoods(
    prior, codes: Codes, known: tuple[Tensor, ...], labels: Tensor | None, ranking: Ranking, batch_size: int
) -> tuple[Tensor, Tensor | None]:
    """log p(codes | label) of each candidate (B R,), and for "importance" the logarithms of their weights.

    An autoregressive prior draws each code given those before it; a known code that comes after a hole has no part in
    filling it. Candidates hence follow a proposal q(unknown) = prod p(unknown code | codes before), each factor
    as the sampling options change it. Where they do not, the conditional p(unknown | known) is proportional to q times
    prod p(known code | codes before), which is the importance weight. A label that was drawn with a candidate is
    weighted too.
    """
    parts = [slice(start, start + batch_size) for start in range(0, len(codes[0]), batch_size)]
    batches = [
        (tuple(level[part] for level in codes), None if labels is None else labels[part].to(codes[0].device))
        for part in parts
    ]
    if ranking == "log_prob":
        return torch.cat([prior.log_prob(*batch) for batch in batches]), None
    by_code = torch.cat([prior.spec.flatten(prior.log_prob_by_code(*batch)) for batch in batches])
    return by_code.sum(dim=1), by_code.masked_fill(~prior.spec.flatten(known), 0.0).sum(dim=1)


def gumbel_noise(generators: list[torch.Generator], device: torch.device) -> Tensor:
    """(len(generators),) standard Gumbel numbers. Added to logarithms of weights, they order by weighted draws.

    In the order of the sums, items are as if drawn one after another without replacement, each with a probability
    proportional to its weight (Yellott 1977).
    """
    uniform = ImageNoise(len(generators), generators, device).uniform().clamp(min=torch.finfo(torch.float32).tiny)
    return -(-uniform.log()).log()
