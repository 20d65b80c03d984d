"""A run folder becomes a pipeline when its first stage is done, and another when its second is."""

from collections.abc import Sequence
from pathlib import Path

from pipelines.pipeline_index import INDEX_NAME, read_index
from pipelines.text import TextTokenizer
from pipelines.two_stage import Pipeline
from prior.base import Prior
from tokenizer.base import Tokenizer


def save_stage_one(folder: Path, tokenizer: Tokenizer, class_names: Sequence[str], metrics: dict) -> bool:
    """Makes a run folder a pipeline with the tokenizer's own prior, unless it already has one that belongs.

    Returns whether a prior in the folder is left out, since it belongs to what the tokenizer was before.
    """
    left_out = (folder / "prior").exists()
    measured = _named("tokenizer", metrics)
    try:
        known = Pipeline.from_pretrained(folder)
        left_out &= not known.has_stage_two
        if known.has_stage_two or measured.items() <= known.metrics.items():
            return left_out  # the tokenizer is the one described there already
    except ValueError:
        if left_out:
            print(f"{folder / 'prior'} does not belong to this tokenizer and is left out of the pipeline; "
                  f"to train another, give another --output, or remove {folder / 'stage_two'}")  # fmt: skip
    Pipeline(tokenizer, class_names=class_names, metrics=measured).save_index(folder)
    return left_out


def save_stage_two(
    folder: Path,
    tokenizer: Tokenizer,
    prior: Prior,
    class_names: Sequence[str],
    metrics: dict,
    text_tokenizer: TextTokenizer | None = None,
) -> None:
    """Enters a trained prior into the index of a run folder, with what was measured of it."""
    index = read_index(folder) if (folder / INDEX_NAME).is_file() else {"metrics": {}, "evaluations": {}}
    known, evaluations = index["metrics"], index["evaluations"]
    measured = _named("prior", metrics)
    if not measured.items() <= known.items():  # numbers of the pipeline with another prior are no longer true
        known = {name: value for name, value in known.items() if name.startswith("validation tokenizer ")}
        evaluations = {}
    pipeline = Pipeline(
        tokenizer, prior, class_names=class_names, metrics={**known, **measured}, evaluations=evaluations,
        text_tokenizer=text_tokenizer,
    )  # fmt: skip
    pipeline.save_index(folder)


def _named(stage: str, metrics: dict) -> dict:
    return {f"validation {stage} {name}": value for name, value in metrics.items()}
