"""What a caller asks a prior for, class labels as numbers or names and prompts, as the numbers that the prior takes."""

from collections.abc import Iterable, Sequence
from numbers import Integral, Number

import torch
from torch import Tensor

from pipelines.drawing import draw_labels
from prior.base import PADDING


def label_ids(labels: Sequence[int | str], class_names: list[str]) -> list[int]:
    """Class numbers of names (or numbers). Raises ValueError naming the known ones."""
    for label in labels:
        if isinstance(label, str) and label not in class_names:
            raise ValueError(f"unknown class '{label}' (known: {', '.join(class_names) or 'none has a name'})")
        if not isinstance(label, (str, Integral)) or isinstance(label, bool):
            raise ValueError(f"a class label is a number or a name, got {label!r}")
    return [class_names.index(label) if isinstance(label, str) else int(label) for label in labels]


def labels_as_typed(
    labels: list[int | str] | int | str | None, class_names: list[str]
) -> list[int | str] | int | str | None:
    """Labels of a command line, where the name "7" and the number 7 look alike: where a number is a name, the name.

    Raises:
        ValueError: a number that may stand for a name with leading zeros, such as 001, which it loses where YAML
            reads a list; in a list, what is quoted is meant as it is.
    """
    if isinstance(labels, list):
        return [_label_as_typed(label, class_names, exact=isinstance(label, str)) for label in labels]
    return _label_as_typed(labels, class_names, exact=False)


def _label_as_typed(label: int | str | None, class_names: list[str], exact: bool) -> int | str | None:
    if label is None or str(label) in class_names:
        return label if label is None else str(label)
    if isinstance(label, str) and not _is_number(label):
        return label
    number = int(label) if isinstance(label, str) else label
    for name in () if exact else class_names:
        if _is_number(name) and int(name) == number:
            raise ValueError(
                f"class label {label} may be the class '{name}', whose zeros are lost where it is read as a "
                f"number; quote it, as in '[\"{name}\"]'"
            )
    return number


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdecimal()


def as_list(values):
    """Tensors and arrays as lists or numbers."""
    return values.tolist() if hasattr(values, "tolist") else values


def requested_labels(
    pipeline, class_labels, prompts, num_images: int, generators: list[torch.Generator], *, num_candidates: int = 1
) -> Tensor | None:
    """What the prior calls labels, class labels or the token ids of prompts, for each candidate of each image.

    Args:
        class_labels, prompts: one for all images, or one per image; see `Pipeline.sample`.
        generators: one for each candidate of each image, from which those without a label draw their own.
    Raises:
        ValueError: not what the prior is conditional on, an unknown class, or another number than of images.
    """
    prior = pipeline.prior
    class_labels, prompts = as_list(class_labels), as_list(prompts)
    if not prior.conditional_on_text:
        if prompts is not None:
            kind = "conditional on classes: give class_labels" if prior.num_classes else "unconditional"
            raise ValueError(f"prompts are for a prior that is conditional on captions, but this one is {kind}")
        if class_labels is None:
            return draw_labels(prior, generators)
        labels = _one_each(class_labels, num_images, "class labels")
        labels = torch.tensor(label_ids(labels, pipeline.class_names), device="cpu")
    else:
        if class_labels is not None:
            raise ValueError("this prior is conditional on captions: give prompts, not class_labels")
        if not isinstance(prompts, Iterable | None):
            raise ValueError(f"prompts must be a caption or a list of them, got {prompts!r}")
        prompts = "" if prompts is None else prompts if isinstance(prompts, str) else list(prompts)
        labels = pipeline.text_tokenizer.encode_prompts(_one_each(prompts, num_images, "prompts"))
        if not prior.learned_unconditional and (labels == PADDING).all(dim=1).any():
            raise ValueError(
                "this prior was trained without class dropout (class_dropout = 0) and does not know what to draw "
                "without a caption; give a prompt for each image"
            )
    return labels.repeat_interleave(num_candidates, dim=0)


def _one_each(values, num_images: int, what: str):
    if isinstance(values, (str, Number)):
        return [values] * num_images
    if len(values) != num_images:
        raise ValueError(f"got {len(values)} {what} for {num_images} images: give one, or one each")
    return values
