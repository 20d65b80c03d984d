"""Feature spaces in which sets of images are compared, and the statistics of a data set in them."""

import importlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from pipelines.batches import read_batch
from pipelines.evaluation.cache import cached
from pipelines.metrics import NotMeasurableError

# Features of a reference set that are kept for precision and recall, besides mean and covariance of all
MOST_KEPT = 10_000


@dataclass(frozen=True)
class FeatureNetwork:
    """A network that turns images into feature vectors.

    suffix: of the names of metrics in this space, "" for Inception's alone. protocol: the network and its weights.
    function: images (B, C, H, W) in [0, 1] to features (B, F) and class logits (B, Y).
    """

    suffix: str
    protocol: dict
    function: Callable[[Tensor], tuple[Tensor, Tensor]]

    @torch.inference_mode()
    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Features (B, F) and logits (B, Y), float32 on the CPU, of images rounded to 8 bits, as files hold them."""
        features, logits = self.function((images.float().clamp(0, 1) * 255).round() / 255)
        return features.float().cpu(), logits.float().cpu()


@dataclass(frozen=True)
class Reference:
    """What samples are compared with.

    statistics: mean and covariance of the features of all images. features: (n, F) of images taken evenly from the
    set, at most `MOST_KEPT`. num_images: of the set. protocol: features and data.
    """

    statistics: dict
    features: Tensor
    num_images: int
    protocol: dict


def batches(dataset, batch_size: int, description: str) -> Iterator[Tensor]:
    """The images of a data set, with a progress bar."""
    for start in tqdm(range(0, len(dataset), batch_size), desc=description, unit="batch", disable=None):
        yield read_batch(dataset, range(start, min(start + batch_size, len(dataset))))["image"]


def extract(network: FeatureNetwork, images: Iterable[Tensor]) -> tuple[Tensor, Tensor]:
    """Features (N, F) and logits (N, Y) of batches of images."""
    features, logits = zip(*map(network, images))
    return torch.cat(features), torch.cat(logits)


def reference_of(network: FeatureNetwork, dataset, *, batch_size: int, cache: Path | None) -> Reference:
    """Statistics of a data set, from the cache if they were computed before by the same protocol."""
    protocol = {"features": network.protocol, "data": dataset.identity}

    def compute() -> dict[str, Tensor]:
        features, _ = extract(network, batches(dataset, batch_size, "reference features"))
        moments = {name: torch.from_numpy(value) for name, value in feature_statistics(features).items()}
        kept = torch.linspace(0, len(features) - 1, min(len(features), MOST_KEPT)).long()
        return {**moments, "features": features[kept]}

    tensors = cached(cache, "reference", protocol, compute)
    statistics = {name: tensors[name].numpy() for name in ("mu", "sigma")}
    return Reference(statistics, tensors["features"], len(dataset), protocol)


def feature_statistics(features: Tensor) -> dict:
    """{"mu": (F,), "sigma": (F, F)} of features (N, F), NumPy float64.

    Raises:
        NotMeasurableError: fewer than two, or some that are not finite.
    """
    if len(features) < 2:
        raise NotMeasurableError(f"a covariance needs at least 2 images, got {len(features)}")
    if not features.isfinite().all():
        raise NotMeasurableError("features of some images are not finite: what decodes them gives no pictures")
    return fidelity("metric_fid").fid_features_to_statistics(features.double())


def frechet_distance(statistics: dict, reference: dict) -> float:
    """|m - m'|^2 + tr(S + S' - 2 (S S')^(1/2)) of two Gaussians (Heusel et al. 2017, arXiv:1706.08500, Eq. 6)."""
    return fidelity("metric_fid").fid_statistics_to_metric(statistics, reference, verbose=False)[
        "frechet_inception_distance"
    ]


def class_score(logits: Tensor) -> tuple[float, float]:
    """exp E KL(p(y | x) || p(y)) (Salimans et al. 2016, arXiv:1606.03498, section 4), over 10 splits.

    Returns:
        mean and standard deviation over the splits.
    Raises:
        NotMeasurableError: fewer than 10 images.
    """
    if len(logits) < 10:
        raise NotMeasurableError(
            f"the Inception score is a mean over 10 splits of the samples, got {len(logits)} samples"
        )
    score = fidelity("metric_isc").isc_features_to_metric(logits)
    return score["inception_score_mean"], score["inception_score_std"]


def precision_recall(samples: Tensor, reference: Tensor) -> tuple[float, float]:
    """Shares of samples within the reference's manifold and the other way round, from features (N, F), (M, F).

    A manifold is the union of balls around its points up to their third neighbours (Kynkaanniemi et al. 2019,
    arXiv:1904.06991, Eq. 1 to 3).

    Raises:
        NotMeasurableError: fewer than 4 images in a set.
    """
    if min(len(samples), len(reference)) < 4:
        raise NotMeasurableError("precision and recall need at least 4 images in each set: one and its 3 neighbours")
    measured = fidelity("metric_prc").prc_features_to_metric(
        samples, reference, prc_neighborhood=3, prc_batch_size=2000, save_cpu_ram=True, verbose=False
    )
    return measured["precision"], measured["recall"]


def fidelity(module: str):
    """A module of torch-fidelity, which takes seconds to import."""
    try:
        return importlib.import_module(f"torch_fidelity.{module}")
    except ImportError as error:
        raise NotMeasurableError(
            f"this needs torch-fidelity: pip install 'tessera-codes[metrics]' ({error})"
        ) from error
