"""What is known of the models of a comparison: a row of numbers each, curves of their training, how it was measured."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path

from pipelines.comparison.running import IN_WORDS, RESULT, Failure, Member, training_folder
from pipelines.config import differences, read_yaml
from pipelines.evaluation.protocol import comparable
from pipelines.files import read_json
from pipelines.training_log import log_entries


@dataclass(frozen=True)
class Column:
    """A column of the table.

    metric: its name in results; label: its heading; unit: of its values; better: "lower", "higher", or None where
    neither is; decimals: shown; meaning: one sentence; error: metric of its standard error.
    """

    metric: str
    label: str
    unit: str
    better: str | None
    decimals: int
    meaning: str
    error: str | None = None


BOUND = "of the bound on -log p(x), a mean over images; lower is better, and it is rate plus distortion or less"
COLUMNS = (
    Column("nats", "-log p(x)", "nats", "lower", 2, f"Nats per image {BOUND}.", "nats_se"),
    Column("bits_per_dim", "-log p(x)", "bits/dim", "lower", 4, f"Bits per pixel and channel {BOUND}.",
           "bits_per_dim_se"),
    Column("rate_nats", "rate", "nats", None, 2, "Nats that the codes cost: KL of q(codes | x) from the prior."),
    Column("distortion_nats", "distortion", "nats", None, 2, "Nats that the pixels cost when the codes are known."),
    Column("psnr", "PSNR", "dB", "higher", 2, "Peak signal-to-noise ratio of reconstructions, a mean over images."),
    Column("ssim", "SSIM", "", "higher", 3, "Structural similarity of reconstructions, a mean over images."),
    Column("lpips", "LPIPS", "", "lower", 3, "Perceptual distance of reconstructions (AlexNet)."),
    Column("rfid", "rFID", "", "lower", 2, "Frechet distance of Inception features: reconstructions and images."),
    Column("rfid_classifier", "rFID\u00a0of a\u00a0classifier", "", "lower", 2,
           "As rFID, in the features of a small classifier trained on these data; it compares with no other FID."),
    Column("fid", "FID", "", "lower", 2, "Frechet distance of Inception features: samples and training images."),
    Column("fid_classifier", "FID\u00a0of a\u00a0classifier", "", "lower", 2,
           "As FID, in the features of a small classifier trained on these data; it compares with no other FID."),
    Column("inception_score", "Inception\u00a0score", "", "higher", 2,
           "exp of the mutual information of samples and their classes, by Inception; a mean over ten parts of them."),
    Column("inception_score_classifier", "Inception\u00a0score of a\u00a0classifier", "", "higher", 2,
           "As the Inception score, by a small classifier trained on these data; it compares with no other score."),
    Column("precision", "precision", "", "higher", 3, "Share of samples that lie among the training images' features."),
    Column("precision_classifier", "precision\u00a0of a\u00a0classifier", "", "higher", 3,
           "Share of samples that lie among the training images, in the features of the small classifier."),
    Column("recall", "recall", "", "higher", 3, "Share of training images that lie among the samples' features."),
    Column("recall_classifier", "recall\u00a0of a\u00a0classifier", "", "higher", 3,
           "Share of training images that lie among the samples, in the features of the small classifier."),
    Column("copying", "copying", "", None, 3,
           "Probability that a sample lies nearer to the training images than a reconstruction of a held-out image: "
           "1/2 for samples of the data's own distribution, towards 1 for copies."),
    Column("nearest_train_sample", "nearest, of\u00a0samples", "", None, 4,
           "Mean distance (of pixels in [0, 1]) from samples to the nearest training image."),
    Column("nearest_train_held_out", "nearest, of\u00a0held-out", "", None, 4,
           "The same from reconstructions of held-out images to the nearest training image."),
    Column("class_agreement", "same\u00a0class", "%", "higher", 1,
           "Share of pairs of images of the same codes that the small classifier takes for the same class; ± is over "
           "pairs.", "class_agreement_se"),
    Column("class_agreement_by_chance", "same\u00a0class, by\u00a0chance", "%", None, 1,
           "The same share of pairs of images whose codes are drawn one by one."),
    Column("codebook_usage", "codes used", "%", "higher", 1, "Share of the codes that occur; a mean over levels."),
    Column("perplexity", "perplexity", "codes", None, 1,
           "exp of the entropy of the codes' frequencies; a geometric mean over levels."),
    Column("position_entropy", "position\u00a0entropy", "nats", None, 3,
           "Entropy of the codes' frequencies at one position, a mean over positions and levels."),
    Column("log_partition", "log Z", "nats", None, 2,
           "Normaliser of a Boltzmann prior; ± is the standard error of its estimate.", "log_partition_se"),
    Column("prior_nats_per_code", "prior", "nats/code", None, 3, "Nats per code under the prior."),
    Column("unigram_nats_per_code", "unigram", "nats/code", None, 3,
           "Nats per validation code under how often each code occurs in training: what a prior must beat."),
    Column("uniform_nats_per_code", "uniform", "nats/code", None, 3, "Nats per code where all are equally likely."),
)  # fmt: skip
# Of data sets that were to be told apart, whose names are a part of the metrics'
OOD = "ood_auroc_"
# What models and their training take
COSTS = (
    Column("tokenizer_parameters", "tokenizer", "parameters", None, 0, "Parameters of the tokenizer."),
    Column("prior_parameters", "prior", "parameters", None, 0,
           "Parameters of the second stage, or of the prior that was learned with the tokenizer."),
    Column("stage_one_steps", "stage one", "steps", None, 0, "Optimizer steps of the tokenizer."),
    Column("stage_one_seconds", "stage one", "s", None, 0, "Seconds of its training alone, on this machine."),
    Column("stage_two_steps", "stage two", "steps", None, 0, "Optimizer steps of the prior."),
    Column("stage_two_seconds", "stage two", "s", None, 0, "Seconds of its training alone, on this machine."),
)  # fmt: skip
# How one number is made of those of several levels
LEVELS = {
    "codebook_usage": lambda values: sum(values) / len(values),
    "perplexity": lambda values: math.exp(sum(map(math.log, values)) / len(values)),
    "position_entropy": lambda values: sum(values) / len(values),
}
# Of what identifies images, what makes them others; see `ImageDataset`
IDENTITY = ("name", "split", "content", "preprocessing")


@dataclass(frozen=True)
class Curve:
    """Validation values of one model: (step, value) in order."""

    name: str
    points: list[tuple[int, float]]


@dataclass
class Findings:
    """A comparison as it stands.

    members: those with a row; rows: {metric: value} of each, in their order; curves: {quantity: curves}; results: of
    each by name; failures: {name: why}; not_measured: {(metric, reason): titles}.
    """

    members: list[Member]
    rows: list[dict[str, float]]
    curves: dict[str, list[Curve]]
    results: dict[str, dict]
    failures: dict[str, Failure] = field(default_factory=dict)
    not_measured: dict[tuple[str, str], list[str]] = field(default_factory=dict)

    @property
    def columns(self) -> list[Column]:
        """Those in which any model has a value."""
        metrics = dict.fromkeys(name for row in self.rows for name, value in row.items() if value is not None)
        others = [ood_column(name.removeprefix(OOD)) for name in metrics if name.startswith(OOD)]
        return [column for column in (*COLUMNS, *others, *COSTS) if column.metric in metrics]

    def note_missing(self, metric: str, reason: str, member: Member) -> None:
        self.not_measured.setdefault((metric, reason), []).append(member.title)


def ood_column(name: str) -> Column:
    """Of how well log p(x) tells another data set from this one."""
    meaning = f"Probability that the bound on log p(x) is higher for an image of these data than for one of {name}."
    return Column(f"{OOD}{name}", f"AUROC, {name}", "", "higher", 3, meaning)


def collect(members: Sequence[Member], failures: dict[str, Failure]) -> Findings:
    """Reads the results of the members that did not fail.

    Raises:
        ValueError: two are of different images, or were measured by different protocols.
    """
    present = [member for member in members if member.name not in failures]
    results = {member.name: read_json(member.folder / RESULT) for member in present}
    check_same_data({name: result["data"] for name, result in results.items()})
    comparable(results)
    rows = []
    for member in present:
        row = dict(results[member.name]["metrics"])
        for name, mean in LEVELS.items():
            levels = [row[key] for key in sorted(row) if re.fullmatch(rf"{name}_\d+", key)]
            if levels:
                row[name] = mean(levels)
        rows.append(row | training_of(member))
    findings = Findings(present, rows, curves_of(present), results, dict(failures))
    for member in present:
        for metric, reason in results[member.name]["not_measured"].items():
            findings.note_missing(metric, reason, member)
    return findings


def check_same_data(data: dict[str, dict]) -> None:
    """Raises ValueError where two members are of different images.

    Args:
        data: identities of images, see `ImageDataset`, or what is known of them, by name of the member.
    """
    for (first, of_first), (second, of_second) in combinations(data.items(), 2):
        known = [field for field in IDENTITY if field in of_first and field in of_second]
        changed = differences({field: of_first[field] for field in known}, {field: of_second[field] for field in known})
        if changed:
            listed = "; ".join(f"{field}: {old} and {new}" for field, (old, new) in changed.items())
            raise ValueError(
                f"{first} and {second} cannot stand in one table, their images differ ({listed}); compare models of "
                "the same data, evaluated on the same split"
            )


def training_of(member: Member) -> dict[str, float]:
    """Steps and seconds of each stage, and nats per code of a unigram table; what its logs do not say is missing."""
    found: dict[str, float] = {}
    for stage in ("stage_one", "stage_two"):
        folder = training_folder(member, stage) / stage
        lines, config = log_lines(folder / "log.jsonl"), folder / "config.yaml"
        if not lines or not config.is_file():
            continue
        batch_size = read_yaml(config)["training"]["batch_size"]
        seconds, last = 0.0, 0
        for line in lines:
            if rate := line.get("train/images_per_second"):
                seconds += (line["step"] - last) * batch_size / rate
                last = line["step"]
        found |= {f"{stage}_steps": lines[-1]["step"], f"{stage}_seconds": seconds}
        if unigram := _points(lines, "unigram_nll"):
            found["unigram_nats_per_code"] = unigram[-1][1]
    return found


def log_lines(path: Path) -> list[dict]:
    """What the whole lines of a log.jsonl say; none without one."""
    return [entry for _, entry in log_entries(path)]


def curves_of(members: Sequence[Member]) -> dict[str, list[Curve]]:
    """Validation curves, in nats per image, of the quantities that are the same thing in every model that has them.

    distortion: -log p(x | codes), of stage one. negative_elbo: distortion plus rate under the prior that is learned
    with the tokenizer. codes: -log p(codes), of stage two; of a stochastic encoder the rate is less by the entropy of
    q(codes | x).
    """
    curves: dict[str, list[Curve]] = {"distortion": [], "negative_elbo": [], "codes": []}
    for member in members:
        first, second = (log_lines(member.folder / stage / "log.jsonl") for stage in ("stage_one", "stage_two"))
        shape = read_json(member.folder / "tokenizer" / "config.json").get("image_shape") or ()
        found = {
            "distortion": _points(first, "distortion") or _points(first, "nll", math.prod(shape)),
            "negative_elbo": _points(first, "negative_elbo"),
            "codes": _points(second, "bits_per_image", math.log(2)),
        }
        for quantity, points in found.items():
            if points:
                curves[quantity].append(Curve(member.name, points))
    return curves


def _points(lines: list[dict], name: str, scale: float = 1.0) -> list[tuple[int, float]]:
    values = [(line["step"], line.get(f"validation/{name}")) for line in lines]
    return [(step, value * scale) for step, value in values if value is not None]


def budget_of(members: Sequence[Member]) -> str:
    """A sentence on how long each stage was trained, and whether that is the same for all."""
    said = []
    for stage in ("stage_one", "stage_two"):
        paths = {training_folder(member, stage) / stage / "config.yaml" for member in members}
        trainings = [read_yaml(path)["training"] for path in paths if path.is_file()]
        budgets = {(training["total_steps"], training["batch_size"]) for training in trainings}
        if len(budgets) == 1:
            ((steps, batch_size),) = budgets
            said.append(f"{IN_WORDS[stage]} takes {steps:,} steps of {batch_size} images")
        elif budgets:
            said.append(f"{IN_WORDS[stage]} was NOT equally long: see its steps")
    return f"Budget: {', '.join(said)}." if said else ""
