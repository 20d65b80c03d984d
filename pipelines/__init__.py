"""Whatever moves data: images, the training loop, codes on disk, folders, and the `Pipeline` of both stages."""

import prior  # noqa: F401 (its guard must run before anything imports torchvision)

__all__ = ["Pipeline", "comparable", "evaluate", "fingerprint", "load_prior", "load_tokenizer"]


def __getattr__(name: str):
    # Only on first use: scripts read their arguments before the heavier parts are imported
    if name == "Pipeline":
        from pipelines.two_stage import Pipeline

        return Pipeline
    if name == "evaluate":
        from pipelines.evaluation.evaluate import evaluate

        return evaluate
    if name == "comparable":
        from pipelines.evaluation.protocol import comparable

        return comparable
    if name in __all__:
        from pipelines import checkpoint

        return getattr(checkpoint, name)
    raise AttributeError(f"module 'pipelines' has no attribute '{name}'")
