"""Everything that is measured of a pipeline on held-out images, with the protocol that each number was measured by."""

import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from pipelines.batches import read_batch
from pipelines.checkpoint import weights_of
from pipelines.evaluation.classifier import classifier_features
from pipelines.evaluation.codebook_pictures import position_entropy, save_codebook_pictures
from pipelines.evaluation.features import MOST_KEPT, FeatureNetwork, feature_statistics, frechet_distance, reference_of
from pipelines.evaluation.image_quality import (
    class_agreement,
    copying,
    draw_samples,
    nearest_images,
    sample_metrics,
    save_neighbours,
)
from pipelines.evaluation.likelihood import (
    LogLikelihoods,
    likelihood_metrics,
    log_likelihoods,
    log_partition_metrics,
    prior_labels,
    standard_error,
)
from pipelines.evaluation.ood import auroc, load_other
from pipelines.evaluation.pretrained import inception_features, lpips_network
from pipelines.evaluation.protocol import ANY, pixels_of, versions
from pipelines.evaluation.reconstruction import SSIM_WINDOW, Reconstructions, reconstruct
from pipelines.metrics import MOST_COUNTED, NotMeasurableError
from tokenizer.registry import nearest_known

Group = Literal["likelihood", "reconstruction", "codebook", "samples", "memorisation", "local"]
GROUPS = get_args(Group)
# Of these, what compares with the images that the model was trained on
NEED_TRAINING_IMAGES = ("reconstruction", "samples", "memorisation", "local")
ENCODED = "mode of q(codes | image)"
EIGHT_BITS = "means of p(x | codes), rounded to 8 bits"


def evaluate(
    pipeline,
    images,
    train_images=None,
    *,
    trained_on_them: bool = True,
    metrics: Sequence[str] | None = None,
    num_draws: int = 1,
    num_samples: int = 1000,
    batch_size: int = 128,
    seed: int = 0,
    inception_weights: str | None = None,
    lpips_weights: str | None = None,
    ood: Sequence[str] = (),
    folder: Path | str | None = None,
    cache: Path | str | None = None,
) -> dict:
    """Measures a pipeline.

    - likelihood: see `likelihood_metrics`, with `log_partition_metrics` for a Boltzmann prior, and
      uniform_nats_per_code, which a prior must beat, beside prior_nats_per_code.
    - reconstruction: psnr (dB, mean over images), mse, ssim, lpips, and rfid: the Frechet distance between features of
      reconstructions and of their originals.
    - codebook: codebook_usage, perplexity and position_entropy (mean over positions, nats), by level where there are
      several; a picture of each level.
    - samples: fid, inception_score, precision and recall of samples against the training images.
    - memorisation: nearest_train_sample and nearest_train_held_out, the mean distance (of pixels in [0, 1]) of samples
      and of reconstructions of held-out images to the nearest training image, and `copying`; a picture of samples,
      each above its nearest training images.
    - local: of a decoder that draws latents of its own, see `class_agreement`.
    - ood_auroc_NAME for each other data set: see `ood.auroc`.

    The features are Inception's where its weights are given. Else they are those of a small classifier that is trained
    here on the data set itself, and the names end in _classifier: such numbers do not compare with any FID. What is
    compared are means of p(x | codes): grey, and far from images of two values that the features were learned on.

    Args:
        pipeline: a `Pipeline`.
        images: held-out images, as of `load_images`.
        train_images: the images that the model was trained on, with the same preprocessing; without them neither
            samples nor memorisation are measured, nor is a classifier trained.
        trained_on_them: false where these are the training images of another data set, which `images` are held out of:
            samples are compared with them and a classifier is trained on them, but memorisation is not measured.
        metrics: the groups to measure; None is all that can be had.
        num_draws: draws of codes per image for the bound, where the encoder is stochastic.
        num_samples: samples drawn for the last three groups.
        batch_size: images computed at a time.
        seed: of draws, samples and the classifier. Torch's own generators are left as they were.
        inception_weights, lpips_weights: a safetensors file or "download"; see `pretrained`. What a download
            that fails would have measured is missing, with its reason.
        ood: other data sets, see `ood.load_other`.
        folder: where pictures go; None makes none.
        cache: where reference statistics and classifiers are kept, with their protocols; None keeps none.
    Returns:
        metrics {name: value}; groups {group: names of its metrics}; protocol {group: what its numbers depend on};
        not_measured {group or metric: why}; pictures {subject: file}; data, the identity of `images`; weights, the
        fingerprints of what was measured; seed; versions.
    Raises:
        ValueError: an argument out of range, a file of other weights, a data set that cannot be had, or nothing that
            can be measured.
    """
    check_numbers(num_draws=num_draws, num_samples=num_samples, batch_size=batch_size, seed=seed)
    check_groups(metrics, ood)
    if train_images is not None and train_images.preprocessing != images.preprocessing:
        raise ValueError("the training images were prepared in another way than those to evaluate; load both alike")
    short_names = _short_names(ood)
    chosen = set(GROUPS if metrics is None else metrics)
    folder, cache = (None if path is None else Path(path) for path in (folder, cache))
    # What may be refused comes before any work
    others = {short: load_other(name, images) for short, name in short_names.items()}
    if metrics is None and not pipeline.tokenizer.has_local_latents:
        chosen.remove("local")  # a reason why it is missing would only be noise
    measure = Evaluation(
        pipeline, images, train_images, chosen, num_draws, num_samples, batch_size, seed, folder, cache,
        trained_on_them=trained_on_them,
    )  # fmt: skip
    if lpips_weights:
        with measure.attempt("lpips"):
            measure.lpips_parts = lpips_network(lpips_weights, device=pipeline.device)
    if inception_weights:
        with measure.attempt("fid"):
            measure.inception = inception_features(inception_weights, device=pipeline.device)
    weights = weights_of(pipeline)
    for group in GROUPS:
        if group in chosen:
            with measure.attempt(group):
                getattr(measure, group)()
    for name, other in others.items():
        with measure.attempt(f"ood_{name}"):
            measure.out_of_distribution(name, other)
    if not measure.metrics:
        raise ValueError(f"nothing could be measured: {'; '.join(measure.not_measured.values())}")
    return {**measure.findings(), "data": images.identity, "weights": weights, "seed": seed, "versions": versions()}


def check_numbers(**numbers: int) -> None:
    """Raises ValueError unless num_draws, num_samples, batch_size and seed, those that are given, are in range."""
    least = {"num_samples": 10, "seed": 0}
    for name, value in numbers.items():
        if value < least.get(name, 1):
            raise ValueError(f"{name} must be at least {least.get(name, 1)}, got {value}")


def check_groups(metrics: Sequence[str] | None, ood: Sequence[str] = ()) -> None:
    """Raises ValueError for metrics that are no groups, or for none where no other data sets are given."""
    for group in metrics or ():
        if group not in GROUPS:
            raise ValueError(f"there are no metrics '{group}'{nearest_known(group, GROUPS)}")
    if not (metrics is None or metrics or ood):
        raise ValueError(f"metrics must name at least one group of {', '.join(GROUPS)}; leave it out for all")


def _short_names(ood: Sequence[str]) -> dict[str, str]:
    """{what a metric calls another data set: its name or folder}."""
    found: dict[str, str] = {}
    for name in ood:
        short = os.path.basename(os.path.abspath(name))
        if found.setdefault(short, name) != name:
            raise ValueError(
                f"ood data sets '{found[short]}' and '{name}' would both be called '{short}' and overwrite each "
                "other; rename one of the folders"
            )
    return found


@dataclass
class Evaluation:
    """One evaluation: what it is of, as the arguments of `evaluate`, and a method for each group of metrics.

    inception, lpips_parts: networks that others trained, of LPIPS with its protocol; None where they cannot be had.
    What is common to several groups is computed once, when it is needed.
    """

    pipeline: object
    images: object
    train_images: object | None
    chosen: set[str]
    num_draws: int
    num_samples: int
    batch_size: int
    seed: int
    folder: Path | None
    cache: Path | None
    trained_on_them: bool = True
    inception: FeatureNetwork | None = None
    lpips_parts: tuple[nn.Module, dict] | None = None

    def __post_init__(self):
        self.metrics: dict[str, float] = {}
        self.groups: dict[str, list[str]] = {}
        self.protocol: dict[str, dict] = {}
        self.not_measured: dict[str, str] = {}
        self.pictures: dict[str, str] = {}

    def findings(self) -> dict:
        return {name: getattr(self, name) for name in ("metrics", "groups", "protocol", "not_measured", "pictures")}

    @contextmanager
    def attempt(self, name: str) -> Iterator[None]:
        """Notes why the block could not measure."""
        try:
            yield
        except NotMeasurableError as error:
            self.not_measured[name] = str(error)

    def add(self, group: str, metrics: dict[str, float], **protocol) -> None:
        for name, value in metrics.items():
            if math.isfinite(value):
                self.metrics[name] = value
                self.groups.setdefault(group, []).append(name)
                self.protocol[group] = protocol
            else:  # JSON has no such number
                self.not_measured[name] = f"it came out as {value}"

    # Groups
    # --------------------------------------------------------------------------------------------

    def likelihood(self) -> None:
        prior = self.pipeline.prior
        protocol = {
            "data": self.images.identity,
            "pixels": pixels_of(self.images.preprocessing),
            "num_draws": self._draws_of_protocol,
        }
        # Before the bound, so that they are seen where it is refused because of them
        self.add("log_partition", log_partition_metrics(prior), **protocol)
        metrics = likelihood_metrics(self.pipeline, self._log_likelihoods, num_draws=self.num_draws)
        if prior.spec.is_discrete:
            metrics["uniform_nats_per_code"] = prior.spec.max_nats / prior.spec.length
        self.add("likelihood", metrics, **protocol)
        if prior.spec.is_discrete:
            with self.attempt("prior_nats_per_code"):  # which came out as NaN where this says why
                prior_labels(self.pipeline, self.images)

    def reconstruction(self) -> None:
        measured = self._reconstructions
        protocol = {"data": self.images.identity, "codes": ENCODED}
        means = {name: values.mean().item() for name, values in measured.values.items()}
        self.not_measured |= measured.not_measured
        self.add("reconstruction", {name: means[name] for name in ("psnr", "mse")}, **protocol)
        if "ssim" in means:
            windows = f"Gaussian, {SSIM_WINDOW} x {SSIM_WINDOW}, deviation 1.5, within the image"
            self.add("ssim", {"ssim": means["ssim"]}, **protocol, windows=windows)
        if "lpips" in means:
            self.add("lpips", {"lpips": means["lpips"]}, **protocol, **self.lpips_parts[1])
        elif self.lpips_parts is None:
            needed = "it needs lpips_weights, of AlexNet: a safetensors file or 'download'"
            self.not_measured.setdefault("lpips", needed)  # where they were given, it says why they cannot be had
        if self._network is not None:
            name = f"rfid{self._network.suffix}"
            with self.attempt(name):
                reference = reference_of(self._network, self.images, batch_size=self.batch_size, cache=self.cache)
                distance = frechet_distance(feature_statistics(measured.features), reference.statistics)
                self.add(name, {name: distance}, **protocol, features=self._network.protocol, pixels=EIGHT_BITS)

    def codebook(self) -> None:
        measured = self._reconstructions
        levels = measured.counts.levels
        if not levels and self.pipeline.tokenizer.spec.is_discrete:
            raise NotMeasurableError(f"codebooks of more than {MOST_COUNTED:,} codes are not counted")
        if not levels:
            raise NotMeasurableError("the codes are real numbers: there is no codebook")
        metrics = measured.counts.summary()
        for level in levels:
            if (table := measured.position_counts[level]) is not None:
                suffix = f"_{level}" if len(levels) > 1 else ""
                metrics[f"position_entropy{suffix}"] = position_entropy(table).mean().item()
        self.add("codebook", metrics, data=self.images.identity, codes=ENCODED)
        if self.folder is not None:
            with self.attempt("pictures of the codebook"):
                counts = {level: measured.counts.get_buffer(f"total_{level}").cpu() for level in levels}
                paths = save_codebook_pictures(self.pipeline.tokenizer, counts, measured.position_counts, self.folder)
                self.pictures |= {path.stem: path.name for path in paths}

    def samples(self) -> None:
        network = self._network
        if network is None:
            raise NotMeasurableError("there is no feature space to compare them in, see fid and fid_classifier")
        samples = self._samples
        reference = reference_of(network, self.train_images, batch_size=self.batch_size, cache=self.cache)
        self.add(
            f"samples{network.suffix}",
            sample_metrics(network, samples, reference, batch_size=self.batch_size),
            **reference.protocol,
            num_samples=len(samples),
            num_reference=reference.num_images,
            num_reference_precision_recall=min(len(samples), reference.num_images, MOST_KEPT),
            sampling="temperature 1, no guidance, classes equally often",
            pixels=EIGHT_BITS,
        )

    def memorisation(self) -> None:
        if not self.trained_on_them:
            raise NotMeasurableError("the training images of this data set are not those that the model was trained on")
        samples, held_out = self._samples, self._decoded_held_out()
        neighbours = nearest_images(torch.cat([samples, held_out]), self.train_images, device=self.pipeline.device)
        of_samples, of_held_out = neighbours.distances[:, 0].split([len(samples), len(held_out)])
        metrics = {
            "nearest_train_sample": of_samples.mean().item(),
            "nearest_train_held_out": of_held_out.mean().item(),
            "copying": copying(of_samples, of_held_out),
        }
        self.add(
            "memorisation",
            metrics,
            data=self.images.identity,
            train=self.train_images.identity,
            num_samples=len(samples),
            num_held_out=len(held_out),
            distance="root mean square of pixels, at 32 x 32 or less; held-out images are reconstructed",
        )
        if self.folder is not None:
            path = save_neighbours(samples, neighbours, self.train_images, self.folder / "nearest_training_images.png")
            self.pictures[path.stem] = path.name

    def local(self) -> None:
        if not self.pipeline.tokenizer.has_local_latents:
            raise NotMeasurableError("the decoder draws no latents of its own: equal codes give equal images")
        if self._classifier is None:
            raise NotMeasurableError("images are compared by their class, see fid_classifier")
        num_pairs = self.num_samples // 2
        self.add(
            "local",
            class_agreement(self.pipeline, self._classifier, num_pairs, **self._options),
            data=self.train_images.identity,
            features=self._classifier.protocol,
            num_pairs=num_pairs,
            sampling="temperature 1, no guidance, classes equally often",
            pixels=EIGHT_BITS,
        )

    def out_of_distribution(self, name: str, other) -> None:
        outside = log_likelihoods(self.pipeline, other, num_draws=self.num_draws, **self._options).bound
        inside = self._log_likelihoods.bound
        metrics = {f"ood_auroc_{name}": auroc(inside, outside), f"ood_nats_{name}": -outside.mean().item()}
        if len(outside) > 1:
            metrics[f"ood_nats_{name}_se"] = standard_error(outside)
        self.add(
            f"ood_{name}",
            metrics,
            data=self.images.identity,
            other=other.identity,
            pixels=pixels_of(self.images.preprocessing),
            num_draws=self._draws_of_protocol,
        )

    # What several groups need
    # --------------------------------------------------------------------------------------------

    @property
    def _options(self) -> dict:
        return {"batch_size": self.batch_size, "seed": self.seed}

    @property
    def _draws_of_protocol(self) -> int | str:
        is_stochastic = self.pipeline.tokenizer.is_stochastic
        return self.num_draws if is_stochastic else f"{ANY}the encoder is deterministic"

    @cached_property
    def _network(self) -> FeatureNetwork | None:
        if self.inception is not None:
            return self.inception
        self.not_measured.setdefault("fid", "it needs inception_weights: a safetensors file or 'download'")
        return self._classifier

    @cached_property
    def _classifier(self) -> FeatureNetwork | None:
        with self.attempt("fid_classifier"):
            if self.train_images is None:
                raise NotMeasurableError("a classifier of the data set is trained on its training images; give them")
            network, accuracy = classifier_features(
                self.train_images, self.images, device=self.pipeline.device, cache=self.cache, seed=self.seed
            )
            metrics = {"classifier_accuracy": accuracy}
            self.add("classifier", metrics, features=network.protocol, tested_on=self.images.identity)
            return network
        return None

    @cached_property
    def _reconstructions(self) -> Reconstructions:
        compared = {}
        if "reconstruction" in self.chosen:
            compared = {"network": self._network, "lpips_network": self.lpips_parts and self.lpips_parts[0]}
        return reconstruct(self.pipeline, self.images, **compared, **self._options)

    @cached_property
    def _samples(self) -> Tensor:
        if self.train_images is None:
            raise NotMeasurableError("samples are compared with the training images; give them")
        return draw_samples(self.pipeline, self.num_samples, **self._options)

    @cached_property
    def _log_likelihoods(self) -> LogLikelihoods:
        return log_likelihoods(self.pipeline, self.images, num_draws=self.num_draws, **self._options)

    def _decoded_held_out(self) -> Tensor:
        """Reconstructions of at most as many held-out images as there are samples: blurred as samples are."""
        count = min(len(self.images), self.num_samples)
        decoded = []
        for keys in torch.linspace(0, len(self.images) - 1, count).long().split(self.batch_size):
            batch = read_batch(self.images, keys.tolist())["image"]
            generator = torch.Generator().manual_seed(keys[0].item())
            batch = batch.to(self.pipeline.device, self.pipeline.dtype)
            decoded.append(self.pipeline.reconstruct(batch, generator=generator, output_type="pt"))
        return torch.cat(decoded)
