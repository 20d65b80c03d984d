"""Rejection sampling: more images than asked for are drawn, and those that a score likes are kept."""

import math
import warnings
from collections.abc import Callable
from numbers import Integral
from typing import NamedTuple

import torch
from torch import Tensor

from pipelines.drawing import decode_codes, draw_codes, draw_labels, one_generator_each, progress_bar
from prior.sampling import is_number

Score = Callable[[Tensor], Tensor]


class Accepted(NamedTuple):
    """What `Pipeline.rejection_sample` returns.

    images: n images as output_type says; scores: (n,) of these images; class_labels: (n,) int64, or None where the
    prior has no classes; indices: (n,) which of the images asked for each is, all of them unless a threshold was out of
    reach; acceptance_rate: accepted images by draws; num_draws: all draws that were looked at.
    """

    images: object
    scores: Tensor
    class_labels: Tensor | None
    indices: Tensor
    acceptance_rate: float
    num_draws: int


def rejection_sample(
    pipeline,
    labels: Tensor | None,
    generators: list[torch.Generator],
    *,
    score: Score | None,
    classifier: Score | None,
    keep_fraction: float | None,
    threshold: float | None,
    max_draws: int,
    batch_size: int,
    **options,
) -> Accepted:
    """`Pipeline.rejection_sample` of checked labels, with images as tensors (n, C, H, W).

    With keep_fraction, 1 / keep_fraction times as many images are drawn as asked for, and the best are kept; among
    images of equal labels only, so that easy classes do not crowd out others. Images of one label come best first. The
    number of draws of each label is rounded up: of one image and keep_fraction = 0.9, two are drawn and half are kept.

    With threshold, each image is drawn again until its score reaches it: what is returned are draws of the model,
    conditioned on the score. Image i depends on its own generator alone, whatever the batch.

    Args:
        labels: what the prior is conditional on, for each image; None where it is unconditional, and with threshold
            also for each draw to have a class of its own.
    Warns:
        UserWarning: some images did not reach the threshold within max_draws draws each; the others are returned.
    Raises:
        ValueError: not one of score and classifier, or of keep_fraction and threshold; a number out of range; a score
            that is not one finite number per image; no image at all that reaches the threshold.
    """
    _check(pipeline.prior, score, classifier, keep_fraction, threshold, max_draws)

    @torch.no_grad()
    def draw(owners: list[int], seeds: list[torch.Generator]) -> tuple[Tensor, Tensor | None, Tensor]:
        """Images for their owners, among those asked for, what they are conditional on, and their scores."""
        own = draw_labels(pipeline.prior, seeds) if labels is None else labels[owners]
        codes, _ = draw_codes(pipeline, own, seeds, batch_size=batch_size, progress=None, **options)
        images = decode_codes(pipeline.tokenizer, codes, seeds, batch_size=batch_size).float()
        parts = images.split(int(batch_size))
        conditions = [None] * len(parts) if own is None else own.split(int(batch_size))
        scores = [_scores(pipeline.prior, score, classifier, *pair) for pair in zip(parts, conditions)]
        return images.cpu(), own, torch.cat(scores)

    with progress_bar(pipeline, total=len(generators), unit="img", desc="rejection sampling") as bar:
        if threshold is not None:
            accepted = _until_threshold(draw, generators, bar, threshold, max_draws, batch_size)
        else:
            accepted = _best_fraction(draw, labels, generators, bar, keep_fraction, batch_size)
    images, own, scores, indices, num_draws = accepted
    classes = None if pipeline.prior.conditional_on_text else own
    return Accepted(images, scores, classes, indices, len(indices) / num_draws, num_draws)


def _until_threshold(draw, generators, bar, threshold: float, max_draws: int, batch_size: int):
    images, labels = [None] * len(generators), [None] * len(generators)
    scores = torch.full((len(generators),), -torch.inf, device="cpu")
    waiting, used, num_draws = list(range(len(generators))), 0, 0
    while waiting and used < max_draws:
        # few that wait fill a batch with several draws each, ever more of them; those after the first that is accepted
        # do not count
        each = int(min(max(1, batch_size // len(waiting)), used + 1, max_draws - used))
        owners = [i for i in waiting for _ in range(each)]
        drawn, conditions, values = draw(owners, [g for i in waiting for g in one_generator_each(each, generators[i])])
        still = []
        for place, (i, own) in enumerate(zip(waiting, values.split(each))):
            good = (own >= threshold).nonzero()[:, 0]
            if len(good):
                first = good[0].item()
                images[i], scores[i] = drawn[place * each + first], own[first]
                labels[i] = None if conditions is None else conditions[place * each + first]
                num_draws += first + 1
                bar.update()
            else:
                scores[i] = max(scores[i], own.max())
                num_draws += each
                still.append(i)
        waiting, used = still, used + each
    indices = torch.tensor([i for i, image in enumerate(images) if image is not None], device="cpu")
    if len(indices) == 0:
        raise ValueError(
            f"none of {num_draws} draws reached threshold = {threshold:g}: the best score was {scores.max():.4g}. "
            "Lower it, raise max_draws, or take keep_fraction"
        )
    if waiting:
        warnings.warn(
            f"only {len(indices)} of {len(generators)} images reached threshold = {threshold:g} within {max_draws} "
            f"draws each ({len(indices) / num_draws:.2%} of {num_draws} were accepted); the others are left out",
            stacklevel=4,
        )
    images, labels = ([values[i] for i in indices] for values in (images, labels))
    return torch.stack(images), None if labels[0] is None else torch.stack(labels), scores[indices], indices, num_draws


def _best_fraction(draw, labels: Tensor | None, generators, bar, keep_fraction: float, batch_size: int):
    groups = _groups(labels, len(generators))
    group_of = {i: number for number, wanted in enumerate(groups) for i in wanted}
    owners, seeds = [], []
    for wanted in groups:
        total = math.ceil(round(len(wanted) / keep_fraction, 6))  # round: 1 / 0.1 is not above 10
        for place, i in enumerate(wanted):
            share = total // len(wanted) + (place < total % len(wanted))
            owners += [i] * share
            seeds += one_generator_each(share, generators[i])
    bar.reset(len(owners))
    best: dict[int, tuple[Tensor, Tensor]] = {}  # images and scores so far, best first
    for start in range(0, len(owners), batch_size):
        part = slice(start, start + batch_size)
        drawn, _, values = draw(owners[part], seeds[part])
        numbers = torch.tensor([group_of[i] for i in owners[part]], device="cpu")
        for number in numbers.unique().tolist():
            images, scores = drawn[numbers == number], values[numbers == number]
            if number in best:
                images, scores = (torch.cat(pair) for pair in zip(best[number], (images, scores)))
            order = scores.argsort(descending=True, stable=True)[: len(groups[number])]
            best[number] = images[order], scores[order]
        bar.update(len(numbers))
    indices = torch.tensor([i for wanted in groups for i in wanted], device="cpu").argsort()
    images, scores = (torch.cat(parts)[indices] for parts in zip(*(best[number] for number in range(len(groups)))))
    return images, labels, scores, torch.arange(len(generators), device="cpu"), len(owners)


def _groups(labels: Tensor | None, num_images: int) -> list[list[int]]:
    """Which of the images asked for have equal labels, in the order in which labels first appear."""
    keys = [0] * num_images if labels is None else [tuple(row) for row in labels.reshape(num_images, -1).tolist()]
    return [[i for i, key in enumerate(keys) if key == group] for group in dict.fromkeys(keys)]


def _scores(prior, score: Score | None, classifier: Score | None, images: Tensor, labels: Tensor | None) -> Tensor:
    if score is not None:
        scores = torch.as_tensor(score(images), device="cpu").detach().float()
    else:
        logits = torch.as_tensor(classifier(images), device="cpu").detach().float()
        if logits.shape != (len(images), prior.num_classes):
            raise ValueError(
                f"classifier must give logits of shape ({len(images)}, number of classes) for {len(images)} images, "
                f"got {tuple(logits.shape)}; the prior has {prior.num_classes} classes"
            )
        scores = logits.softmax(dim=1).gather(1, labels.cpu()[:, None])[:, 0]
    if scores.shape != (len(images),) or not scores.isfinite().all():
        raise ValueError(
            f"score must give one finite number for each of {len(images)} images, got {tuple(scores.shape)}"
            + ("" if scores.isfinite().all() else " with values that are not finite")
        )
    return scores


def _check(prior, score, classifier, keep_fraction, threshold, max_draws: int) -> None:
    if (score is None) == (classifier is None):
        raise ValueError("rejection sampling needs either a score or a classifier, got " + _both_or_none(score))
    if (keep_fraction is None) == (threshold is None):
        raise ValueError(
            "rejection sampling needs either keep_fraction or threshold, got " + _both_or_none(keep_fraction)
        )
    if classifier is not None and prior.num_classes == 0:
        raise ValueError("a classifier scores an image by its class, but this prior has no classes; give a score")
    if keep_fraction is not None and not (is_number(keep_fraction) and 0 < keep_fraction <= 1):
        raise ValueError(f"keep_fraction must lie in (0, 1], got {keep_fraction!r}")
    if threshold is not None and not (is_number(threshold) and math.isfinite(threshold)):
        raise ValueError(f"threshold must be finite, got {threshold!r}")
    if not isinstance(max_draws, Integral):
        raise ValueError(f"max_draws must be an integer, got {max_draws!r}")
    if max_draws < 1:
        raise ValueError(f"max_draws must be at least 1, got {max_draws}")


def _both_or_none(value) -> str:
    return "none" if value is None else "both"
