"""The model card of a saved pipeline, filled from measured numbers only."""

from huggingface_hub import ModelCardData


def model_card(pipeline) -> str:
    """README.md of a pipeline folder: what it is, how to use it, what was measured."""
    tokenizer, prior = pipeline.tokenizer, pipeline.prior
    channels, height, width = tokenizer.config.image_shape
    levels = ", ".join(
        f"{' x '.join(map(str, shape))} codes of {vocab_size}"
        for shape, vocab_size in zip(tokenizer.spec.shapes, tokenizer.spec.vocab_sizes)
    )
    data = ModelCardData(library_name="tessera", tags=["image-tokenizer", "vector-quantization"],
                         pipeline_tag="unconditional-image-generation")  # fmt: skip
    classes = f"class-conditional ({prior.num_classes} classes)" if prior.num_classes else "unconditional"
    names = [name.replace("|", "\\|") for name in pipeline.class_names if prior.num_classes]
    listed = ", ".join(names[:20]) + (f", ... ({len(names)} in all)" if len(names) > 20 else "")
    class_row = f"\n| classes | {listed} |" if names else ""
    stage_two = f"`{type(prior).__name__}`, {classes}" if pipeline.has_stage_two else "none: the tokenizer's own prior"
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

images = Pipeline.from_pretrained("path/to/this/folder").sample(16)
```

## Measured

{_metrics_table(pipeline.metrics)}
"""


def _count(model) -> str:
    return f"{sum(p.numel() for p in model.parameters()):,}"


def _metrics_table(metrics: dict) -> str:
    if not metrics:
        return "Nothing yet; `scripts/evaluate.py` fills this table."
    rows = [f"| {name} | {_number(value)} |" for name, value in metrics.items()]
    units = (
        "The tokenizer's nll is in nats per pixel and channel, the prior's in nats per code, psnr in dB; nats and "
        "bits_per_dim bound -log p(x) of the pixels, as distortion (p(x | codes)) plus rate (p(codes))."
    )
    return "\n".join(["| metric | value |", "|---|---|", *rows, "", units])


def _number(value) -> str:
    return f"{value:.5g}" if isinstance(value, float) else str(value)
