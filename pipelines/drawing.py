"""Drawing and decoding codes in batches, image by image on its own generator: what sampling of every kind shares."""

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor
from tqdm.auto import tqdm

from prior.base import Codes
from prior.sampling import ImageNoise

Generators = torch.Generator | Sequence[torch.Generator]


def one_generator_each(num_images: int, generator: Generators | None) -> list[torch.Generator]:
    """A generator per image from one for all, a list of them, or None for torch's default generator."""
    return ImageNoise(num_images, generator, torch.device("cpu")).generators


def draw_labels(prior, generators: list[torch.Generator]) -> Tensor | None:
    """(len(generators),) uniform class labels, each from its own generator; None where the prior has no classes."""
    if prior.num_classes == 0:
        return None
    draws = [torch.randint(prior.num_classes, (), generator=g, device=g.device).item() for g in generators]
    return torch.tensor(draws, device="cpu")


def progress_bar(pipeline, iterable: Iterable | None = None, **options) -> tqdm:
    """A `tqdm` that looks as `Pipeline.set_progress_bar_config` says."""
    return tqdm(iterable, **{**options, **pipeline.progress_bar_config})


@torch.no_grad()
def draw_codes(
    pipeline,
    labels: Tensor | None,
    generators: list[torch.Generator],
    *,
    batch_size: int,
    progress: str | None = "sampling",
    given: tuple[Codes, Codes] | None = None,
    codes_callback: Callable[[Codes, Codes], None] | None = None,
    return_log_prob: bool = False,
    **options,
) -> tuple[Codes, Tensor | None]:
    """Codes of len(generators) images, `batch_size` at a time; see `Prior.sample`.

    Args:
        progress: what the progress bar says; None for none.
    Returns:
        the codes, and with return_log_prob the log-probability (B,) of each draw in nats.
    """
    num_images = len(generators)
    parts: list[Codes] = []
    log_probs: list[Tensor] = []
    silent = progress is None
    with tqdm(disable=True) if silent else progress_bar(pipeline, total=num_images, unit="img", desc=progress) as bar:
        for start in range(0, num_images, batch_size):
            part = slice(start, min(start + batch_size, num_images))
            size = part.stop - part.start

            def advance(done: int, total: int, start=start, size=size):
                bar.n = start + size * done // total
                bar.refresh() if done == total else bar.update(0)

            drawn = pipeline.prior.sample(
                size,
                None if labels is None else labels[part],
                generator=generators[part],
                given=None if given is None else tuple(tuple(level[part] for level in levels) for levels in given),
                callback=advance,
                codes_callback=codes_callback,
                return_log_prob=return_log_prob,
                **options,
            )
            parts.append(drawn.codes if return_log_prob else drawn)
            log_probs += [drawn.log_prob] if return_log_prob else []
    codes = tuple(torch.cat(levels) for levels in zip(*parts))
    return codes, torch.cat(log_probs) if return_log_prob else None


@torch.no_grad()
def encode_images(tokenizer, images: Tensor, *, batch_size: int) -> Codes:
    """Codes of images (B, C, H, W) in [0, 1], `batch_size` at a time."""
    return tuple(torch.cat(levels) for levels in zip(*map(tokenizer.encode, images.split(int(batch_size)))))


@torch.no_grad()
def decode_codes(
    tokenizer,
    codes: Codes,
    generators: list[torch.Generator],
    *,
    batch_size: int,
    device: torch.device | str | None = None,
) -> Tensor:
    """Images (B, C, H, W) in [0, 1] of codes, `batch_size` at a time.

    Args:
        device: where each batch goes, before the next is decoded; by default all stay where the tokenizer is.
    """
    images = []
    for start in range(0, len(codes[0]), batch_size):
        part = slice(start, start + batch_size)
        images.append(tokenizer.decode(tuple(level[part] for level in codes), generators[part]).to(device))
    return torch.cat(images)
