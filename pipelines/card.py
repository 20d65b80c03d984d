"""The model card of a saved pipeline, filled from measured numbers only."""

from huggingface_hub import ModelCardData

from pipelines.evaluation.report import format_rows, parts_of


def model_card(pipeline) -> str:
    """README.md of a pipeline folder: what it is, how to use it, what was measured."""
    tokenizer, prior = pipeline.tokenizer, pipeline.prior
    channels, height, width = tokenizer.config.image_shape
    levels = ", ".join(
        f"{' x '.join(map(str, shape))} {'real numbers' if vocab_size is None else f'codes of {vocab_size}'}"
        for shape, vocab_size in zip(tokenizer.spec.shapes, tokenizer.spec.vocab_sizes)
    )
    task = "text-to-image" if prior.conditional_on_text else "unconditional-image-generation"
    data = ModelCardData(library_name="tessera", tags=["image-tokenizer", "vector-quantization"],
                         pipeline_tag=task)  # fmt: skip
    classes = f"class-conditional ({prior.num_classes} classes)" if prior.num_classes else "unconditional"
    if prior.conditional_on_text:
        classes = f"conditional on captions of up to {prior.config.max_text_length} tokens"
    names = [_cell(name) for name in pipeline.class_names if prior.num_classes]
    listed = ", ".join(names[:20]) + (f", ... ({len(names)} in all)" if len(names) > 20 else "")
    class_row = f"\n| classes | {listed} |" if names else ""
    stage_two = f"`{type(prior).__name__}`, {classes}" if pipeline.has_stage_two else "none: the tokenizer's own prior"
    sample = 'prompts=["..."]' if prior.conditional_on_text else "16"
    return f"""---
{data.to_yaml()}
---

# {type(tokenizer).__name__}{f" + {type(prior).__name__}" if pipeline.has_stage_two else ""}

| | |
|---|---|
| images | {channels} x {height} x {width} |
| codes | {levels} |
| tokenizer | `{type(tokenizer).__name__}`, {_count(tokenizer)} parameters |
| prior | {stage_two}, {_count(prior)} parameters |{class_row}

```python
from pipelines import Pipeline

images = Pipeline.from_pretrained("path/to/this/folder").sample({sample})
```

## Measured

{_metrics_table(pipeline.metrics)}
{_evaluations(pipeline.evaluations)}"""


def _cell(text: str) -> str:
    """Text in one cell of a table, whatever a user called a class or a folder."""
    for character in "\\|`<>":
        text = text.replace(character, f"\\{character}")
    return " ".join(text.split())


def _count(model) -> str:
    return f"{sum(p.numel() for p in model.parameters()):,}"


def _metrics_table(metrics: dict) -> str:
    if not metrics:
        return "Nothing yet; `scripts/evaluate.py` fills this table."
    rows = [f"| {_cell(name)} | {text} |" for name, text in format_rows(metrics).items()]
    units = (
        "The tokenizer's nll is in nats per pixel and channel, the prior's in nats per code, as are those of a uniform "
        "and of a unigram distribution; bits_per_image are those of the codes; psnr in dB; nats and "
        "bits_per_dim bound -log p(x) of the pixels, as distortion (p(x | codes)) plus rate (p(codes)); ± is one "
        "standard error over images, of inception_score the standard deviation over ten splits."
    )
    return "\n".join(["| metric | value |", "|---|---|", *rows, "", units])


def _evaluations(evaluations: dict) -> str:
    """How the numbers of `scripts/evaluate.py` came about."""
    sections = []
    for split, evaluation in evaluations.items():
        lines = [
            f"\n### Numbers of the {split} images\n",
            *map(_part, parts_of(evaluation)),
            f"- data: {_data(evaluation['data'])}",
            *(f"- {group}: {_protocol(fields)}" for group, fields in evaluation["protocol"].items()),
            *(f"- not measured, {name}: {reason}" for name, reason in evaluation["not_measured"].items()),
            "",
        ]
        sections.append("\n".join(lines))
    return "".join(sections)


def _part(part: dict) -> str:
    """Which groups one evaluation measured, and by what; those not measured anew are of an earlier one."""
    versions = ", ".join(f"{name} {version}" for name, version in part["versions"].items())
    groups = ", ".join(part["groups"])
    return f"{groups}: seed {part['seed']}, {versions}\n\n```bash\n{part['command']}\n```\n"


def _protocol(fields: dict) -> str:
    """In one line, data sets by name, split, number and content."""
    parts = []
    for name, value in fields.items():
        if isinstance(value, dict) and "content" in value:
            value = _data(value)
        elif isinstance(value, dict):
            value = "(" + _protocol(value) + ")"
        elif isinstance(value, str) and len(value) == 64:  # a hash
            value = value[:12]
        parts.append(f"{name.replace('_', ' ')} {value}")
    return ", ".join(parts)


def _data(identity: dict) -> str:
    return f"{_cell(identity['name'])} {identity['split']} ({identity['count']:,} images, {identity['content'][:12]})"
