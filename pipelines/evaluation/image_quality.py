"""How near samples are to a data set, and whether they are copies of the training images."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from pipelines.batches import derived_seed, read_batch
from pipelines.drawing import decode_codes, one_generator_each
from pipelines.evaluation.classifier import at_most
from pipelines.evaluation.features import (
    FeatureNetwork,
    Reference,
    batches,
    class_score,
    extract,
    feature_statistics,
    frechet_distance,
    precision_recall,
)
from pipelines.metrics import NotMeasurableError
from pipelines.pictures import save_grid
from prior.base import Codes

# Distances are taken of images averaged down to this side: a copy that is off by a pixel is still near
LARGEST_SIDE = 32
NUM_NEIGHBOURS = 3
# Samples in the picture: those nearest to a training image, and as many others
NUM_SHOWN = 8


def draw_samples(
    pipeline, num_samples: int, *, batch_size: int, seed: int, output_type: Literal["pt", "codes"] = "pt"
) -> Tensor | Codes:
    """Images (N, C, H, W) in [0, 1] of the model's own distribution: temperature 1, no guidance, any class alike.

    Args:
        output_type: "pt", or "codes" for those of the images.
    Raises:
        NotMeasurableError: the prior is conditional on captions.
    """
    if pipeline.prior.conditional_on_text:
        raise NotMeasurableError(
            "this prior draws images for captions; samples are measured of priors that need none or a class"
        )
    generator = torch.Generator().manual_seed(derived_seed(seed, "samples"))
    return pipeline.sample(num_samples, generator=generator, output_type=output_type, batch_size=batch_size)


def class_agreement(
    pipeline, classifier: FeatureNetwork, num_pairs: int, *, batch_size: int, seed: int
) -> dict[str, float]:
    """How much the codes say of the class, where the decoder draws latents of its own.

    The share of pairs of images with the same codes that a classifier of the data set takes for the same class, with
    its standard error, and that of pairs with codes drawn one by one: what chance gives.

    Raises:
        NotMeasurableError: the prior is conditional on captions.
    """
    codes = draw_samples(pipeline, num_pairs, batch_size=batch_size, seed=seed, output_type="codes")
    classes = []
    for pose in range(2):
        noise = torch.Generator().manual_seed(derived_seed(seed, "pose", pose))
        generators = one_generator_each(num_pairs, noise)
        images = decode_codes(pipeline.tokenizer, codes, generators, batch_size=batch_size, device="cpu")
        classes.append(extract(classifier, images.split(batch_size))[1].argmax(dim=1))
    same = (classes[0] == classes[1]).sum().item()
    num_classes = 1 + max(labels.max().item() for labels in classes)
    first, second = (labels.bincount(minlength=num_classes) for labels in classes)
    agreement = same / num_pairs
    return {
        "class_agreement": agreement,
        "class_agreement_se": math.sqrt(agreement * (1 - agreement) / num_pairs),
        "class_agreement_by_chance": ((first * second).sum().item() - same) / (num_pairs * (num_pairs - 1)),
    }


def sample_metrics(
    network: FeatureNetwork, samples: Tensor, reference: Reference, *, batch_size: int = 128
) -> dict[str, float]:
    """fid, inception_score, precision and recall of samples (N, C, H, W), with the suffix of the feature space.

    Precision and recall take as many images of the reference as there are samples, or all it has.
    """
    features, logits = extract(network, samples.split(batch_size))
    score, deviation = class_score(logits)
    chosen = torch.linspace(0, len(reference.features) - 1, min(len(samples), len(reference.features))).long()
    precision, recall = precision_recall(features, reference.features[chosen])
    suffix = network.suffix
    return {
        f"fid{suffix}": frechet_distance(feature_statistics(features), reference.statistics),
        f"inception_score{suffix}": score,
        f"inception_score{suffix}_std": deviation,
        f"precision{suffix}": precision,
        f"recall{suffix}": recall,
    }


@dataclass(frozen=True)
class Neighbours:
    """The nearest images of a data set: distances (Q, k), increasing, and their indices (Q, k)."""

    distances: Tensor
    indices: Tensor


@torch.inference_mode()
def nearest_images(queries: Tensor, dataset, *, batch_size: int = 1024, device=None) -> Neighbours:
    """The `NUM_NEIGHBOURS` nearest of images (Q, C, H, W) in a data set, by exhaustive search.

    The distance is the root of the mean squared difference of pixels in [0, 1], at 32 pixels or less.
    """
    queries = at_most(queries.float().to(device), LARGEST_SIDE).flatten(1)
    half_squares = queries.square().sum(dim=1, keepdim=True) / 2
    best = torch.zeros((len(queries), 0), device=queries.device)
    indices = torch.zeros((len(queries), 0), dtype=torch.int64, device=queries.device)
    start = 0
    for batch in batches(dataset, batch_size, "nearest training images"):
        images = at_most(batch.float().to(queries.device), LARGEST_SIDE).flatten(1)
        # |x - y|^2 / 2 = |x|^2 / 2 + |y|^2 / 2 - x.y
        distances = torch.addmm(half_squares + images.square().sum(dim=1) / 2, queries, images.T, alpha=-1)
        own = torch.arange(start, start + len(images), device=queries.device).expand(len(queries), -1)
        best, indices = torch.cat([best, distances], dim=1), torch.cat([indices, own], dim=1)
        best, order = best.topk(min(NUM_NEIGHBOURS, best.shape[1]), largest=False)
        indices, start = indices.gather(1, order), start + len(images)
    return Neighbours((2 * best.clamp(min=0) / queries.shape[1]).sqrt().cpu(), indices.cpu())


def copying(samples: Tensor, held_out: Tensor) -> float:
    """The probability that a sample lies nearer to the training images than a held-out image does.

    From distances (N,), (M,) to the nearest training image; ties count half; nan if one of them is. 1/2 for samples of
    the data's own distribution, towards 1 for copies (Meehan, Chaudhuri & Dasgupta 2020, arXiv:2004.05675).
    """
    if held_out.isnan().any() or samples.isnan().any():
        return math.nan
    held_out, samples = held_out.sort().values, samples.contiguous()
    farther = len(held_out) - torch.searchsorted(held_out, samples, right=True)
    farther_or_equal = len(held_out) - torch.searchsorted(held_out, samples)
    return ((farther + farther_or_equal).double().mean() / (2 * len(held_out))).item()


def save_neighbours(samples: Tensor, neighbours: Neighbours, dataset, path: Path) -> Path:
    """A picture of samples, each above its nearest training images: the samples nearest to any, then some others.

    Args:
        samples: (N, C, H, W) in [0, 1].
        neighbours: of the samples, in the first N rows.
        dataset: the training images.
        path: of the PNG.
    """
    order = neighbours.distances[: len(samples), 0].argsort()
    nearest = order[:NUM_SHOWN]
    others = order[NUM_SHOWN:].sort().values[:NUM_SHOWN]
    blocks = []
    for shown in (nearest, others):
        if len(shown) == len(nearest):  # whole rows only
            keys = neighbours.indices[shown].T  # (k, shown)
            rows = [read_batch(dataset, row.tolist())["image"] for row in keys]
            blocks += [samples[shown], *rows]
    return save_grid(torch.cat(blocks), path, columns=len(nearest))
