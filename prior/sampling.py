"""From logits to codes: temperature, top-k, top-p, min-p, guidance, and noise that belongs to each image alone."""

import functools
import importlib.util
import math
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from numbers import Integral, Real
from typing import Literal

import torch
from torch import Tensor

from prior.float64 import in_float64

NOT_NUMBERS = (
    "the logits of the codes overflowed or are not numbers: the weights are damaged, or too large for their type; "
    "in float16 take bfloat16 or float32, and a smaller guidance_scale where it is large"
)

# Where a draw is one kernel, if there is Triton, which torch brings to Linux with its GPU builds
FUSED_DEVICE = "cuda"
# Where cumulative sums never fall, since they are made in order, and can be searched
SUMS_IN_ORDER = ("cpu",)

GuidanceSchedule = Literal["constant", "linear"] | tuple[float, float]


@dataclass(frozen=True)
class SamplingOptions:
    """How logits become a distribution to draw from; see `Prior.sample` for the meaning of each field.

    Raises:
        ValueError: a value out of range.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    guidance_scale: float = 1.0
    guidance_schedule: GuidanceSchedule = "constant"

    def __post_init__(self):
        if not (is_number(self.temperature) and 0 <= self.temperature < math.inf):
            raise ValueError(f"temperature must be finite and at least 0, got {self.temperature!r}")
        if self.top_k is not None and (not isinstance(self.top_k, Integral) or self.top_k < 1):
            raise ValueError(f"top_k must be an integer of at least 1, or None to keep every code, got {self.top_k!r}")
        if self.top_p is not None and not (is_number(self.top_p) and 0 < self.top_p <= 1):
            raise ValueError(f"top_p must lie in (0, 1], or be None to keep every code, got {self.top_p!r}")
        if self.min_p is not None and not (is_number(self.min_p) and 0 <= self.min_p <= 1):
            raise ValueError(f"min_p must lie in [0, 1], or be None to keep every code, got {self.min_p!r}")
        if not (is_number(self.guidance_scale) and 0 <= self.guidance_scale < math.inf):
            raise ValueError(f"guidance_scale must be finite and at least 0, got {self.guidance_scale!r}")
        for name in ("temperature", "top_p", "min_p", "guidance_scale"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, float(getattr(self, name)))
        object.__setattr__(self, "guidance_schedule", _checked_schedule(self.guidance_schedule))
        # what changes nothing is not an option at all, so that every prior can honour it
        if self.top_p == 1:
            object.__setattr__(self, "top_p", None)
        if self.min_p == 0:
            object.__setattr__(self, "min_p", None)
        if self.guidance_scale == 1:
            object.__setattr__(self, "guidance_schedule", "constant")

    @property
    def filtering(self) -> bool:
        """Whether anything but guidance changes the distribution."""
        return self.temperature != 1 or self.top_k is not None or self.top_p is not None or self.min_p is not None

    @property
    def guided(self) -> bool:
        """Whether the logits without the condition are needed; true even where some positions have scale 1."""
        return self.guidance_scale != 1

    def guidance_at(self, position: int, length: int) -> float:
        """The scale at one position, from 0 on, of a sequence of `length` codes."""
        if self.guidance_schedule == "constant":
            return self.guidance_scale
        if self.guidance_schedule == "linear":
            return 1 + (self.guidance_scale - 1) * (position / (length - 1) if length > 1 else 1.0)
        start, end = self.guidance_schedule
        return self.guidance_scale if start <= position / length < end else 1.0

    def names_set(self) -> set[str]:
        """Names of the options that differ from their default."""
        return {field.name for field in fields(self) if getattr(self, field.name) != field.default}


def is_number(value) -> bool:
    """Whether it is a real number of Python, NumPy or torch; text that reads like one is none."""
    return isinstance(value, Real) or (isinstance(value, Tensor) and value.ndim == 0)


def _checked_schedule(schedule) -> GuidanceSchedule:
    if isinstance(schedule, str) and schedule in ("constant", "linear"):
        return schedule
    interval = schedule if isinstance(schedule, (tuple, list)) and len(schedule) == 2 else ()
    if interval and all(isinstance(bound, Real) for bound in interval) and 0 <= interval[0] < interval[1] <= 1:
        return float(interval[0]), float(interval[1])
    raise ValueError(
        "guidance_schedule must be 'constant', 'linear', or an interval (start, end) of the sequence with "
        f"0 <= start < end <= 1, got {schedule!r}"
    )


def final_logits(logits: Tensor, options: SamplingOptions, position: int, length: int) -> Tensor:
    """(B, K): the logits of the distribution that the code of one position is drawn from.

    In float32, except where no option changes anything.

    Args:
        logits: (B, K); with guidance (2 B, K), the conditional ones first.
        options: how to change the distribution that the logits stand for.
        position: of the code in its sequence of `length` codes, from 0 on.
    """
    if options.guided:
        conditional, unconditional = logits.chunk(2)
        scale = options.guidance_at(position, length)
        logits = conditional if scale == 1 else guide(conditional, unconditional, scale)
    return filter_logits(logits, options)


def guide(conditional: Tensor, unconditional: Tensor, scale: float) -> Tensor:
    """Classifier-free guidance (Ho & Salimans 2022, arXiv:2207.12598) of logits, in float32.

    The scale is that of p(c | label)^scale p(c)^(1 - scale): 0 is unconditional, 1 conditional; the paper's w is
    scale - 1.
    """
    unconditional = unconditional.float()
    return unconditional + scale * (conditional.float() - unconditional)


def filter_logits(logits: Tensor, options: SamplingOptions) -> Tensor:
    """Logits (..., K) with temperature, top-k, top-p, then min-p applied: the order of `transformers`.

    In float32, except where nothing is to be applied.
    Codes that are filtered out get minus infinity; at least one code is kept. Codes that tie with the last one kept are
    kept too, so that the result does not depend on a device's order of sorting; of equal codes, temperature 0 takes the
    first. A constant may have been subtracted.
    """
    if not options.filtering:
        return logits
    logits = logits.float()
    # the largest is 0 from here on, so a small temperature sends the others to -inf and never overflows
    logits = logits - logits.amax(-1, keepdim=True)
    if options.temperature <= torch.finfo(torch.float32).tiny:
        best = logits.argmax(-1, keepdim=True)
        # the largest itself, which is 0, and not a number where they are none
        return torch.full_like(logits, -torch.inf).scatter(-1, best, logits.gather(-1, best))
    if options.temperature != 1:
        logits = logits / options.temperature
    if options.top_k is not None:
        # topk, not sort: K is often 16384 and k some hundreds
        ordered = logits.topk(min(options.top_k, logits.shape[-1])).values
        logits = logits.masked_fill(logits < ordered[..., -1:], -torch.inf)
    elif options.top_p is not None:
        ordered = logits.sort(dim=-1, descending=True).values
    if options.top_p is not None:
        # the nucleus reaches to the last code before which less than top_p has been collected
        probabilities = (ordered - logits.logsumexp(-1, keepdim=True)).exp()
        before = cumulative_sum(probabilities) - probabilities  # 0 for the first, which is hence always kept
        last = (before < options.top_p).sum(-1, keepdim=True).clamp_(min=1) - 1  # none is, where they are nan
        logits = logits.masked_fill(logits < ordered.gather(-1, last), -torch.inf)
    if options.min_p is not None:
        # the most probable code has logit 0: p >= min_p max p (Nguyen et al. 2024, arXiv:2407.01082)
        logits = logits.masked_fill(logits < math.log(options.min_p), -torch.inf)
    return logits


def draw(logits: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """Codes (B,) from logits (B, K) and noise (B,) in [0, 1 - 2^-24], the range of `torch.rand`.

    With them come the sums of the probabilities (B, 1), for `check_totals` after the last code.

    By the inverse of the cumulative distribution: the same noise gives the same codes on every device, up to rounding,
    unlike `torch.multinomial`; a code of probability zero is never drawn.
    """
    fused = _fused_draw(logits.shape[-1]) if logits.device.type == FUSED_DEVICE else None
    if fused is not None:
        return fused(logits, uniform)
    probabilities = logits.float().softmax(-1)
    cumulative = cumulative_sum(probabilities)
    # u (1 - 2^-24) rounds to less than its other factor in float32, so that the target lies below the largest value
    if logits.device.type in SUMS_IN_ORDER:
        total = cumulative[:, -1:].clone()  # a view would keep all of them, for every code
        codes = torch.searchsorted(cumulative, total * uniform[:, None], right=True)[:, 0]
        codes.clamp_(max=logits.shape[-1] - 1)  # what are not numbers exceed nothing
    else:
        # a parallel sum need not be monotone; impossible codes at 0 cannot be the first to exceed the target
        cumulative.masked_fill_(probabilities == 0, 0.0)
        total = cumulative.amax(-1, keepdim=True)
        codes = (cumulative > total * uniform[:, None]).int().argmax(-1)  # the first
    return codes, total


def _fused_draw(num_codes: int) -> Callable | None:
    """`draw` as one kernel, where there is Triton and the codes are not too many for it."""
    if not has_kernels():
        return None
    from prior.sampling_triton import MOST_CODES, fused_draw  # here, since it imports Triton

    return fused_draw if num_codes <= MOST_CODES else None


@functools.cache
def has_kernels() -> bool:
    """Whether Triton's kernels can be had: that it is installed, and a C compiler, which it calls at their start."""
    compilers = ("CC" in os.environ, *map(shutil.which, ("cc", "gcc", "clang")))
    return importlib.util.find_spec("triton") is not None and any(compilers)


def cumulative_sum(probabilities: Tensor) -> Tensor:
    """Along the last dimension; in fixed point where torch is asked for determinism, since GPUs have no other then."""
    if not torch.are_deterministic_algorithms_enabled():
        return probabilities.cumsum(-1)
    return (in_float64(probabilities) * 2**48).long().cumsum(-1).double().mul_(2**-48).to(probabilities)


def check_totals(totals: list[Tensor]) -> None:
    """Raises ValueError where codes came from what is no distribution, given the sums that `draw` gave with them.

    Once for all codes: a look at a number makes the processor wait for a GPU.
    """
    if not (torch.stack(totals) > 0).all():
        raise ValueError(NOT_NUMBERS)


def log_prob_of(codes: Tensor, logits: Tensor) -> Tensor:
    """Log-probabilities (B,), in nats, of codes (B,) of the distributions that logits (B, K) stand for."""
    return logits.float().log_softmax(-1).gather(-1, codes[:, None])[:, 0]


class ImageNoise:
    """Noise that each image draws from its own generator.

    One generator for the whole batch only draws one seed per image from it, so that image i is the same in a batch of
    any size. Generators live on the CPU by preference: then a picture is the same on every device.

    Raises:
        ValueError: neither a generator nor a list of as many as there are images.
    """

    def __init__(
        self,
        num_images: int,
        generator: torch.Generator | Sequence[torch.Generator] | None,
        device: torch.device,
    ):
        self.device = device
        if generator is None or isinstance(generator, torch.Generator):
            source = torch.device("cpu") if generator is None else generator.device
            seeds = torch.randint(2**62, (num_images,), generator=generator, device=source).tolist()
            self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        elif isinstance(generator, Sequence):
            self.generators = list(generator)
        else:
            self.generators = [generator]
        if not all(isinstance(one, torch.Generator) for one in self.generators):
            raise ValueError(f"generator must be a torch.Generator or a list of them, got {generator!r}")
        if len(self.generators) != num_images:
            raise ValueError(f"got {len(self.generators)} generators for {num_images} images: give one, or one each")

    def uniform(self, *shape: int) -> Tensor:
        """(B, *shape) numbers in [0, 1), row i from the generator of image i."""
        return self._draw(Tensor.uniform_, shape)

    def integers(self, *shape: int) -> Tensor:
        """(B, *shape) whole numbers from 0 to 2^62 - 1, row i from the generator of image i."""
        return self._draw(lambda row, generator: row.random_(2**62, generator=generator), shape, torch.int64)

    def normal(self, *shape: int) -> Tensor:
        """(B, *shape) standard normal numbers, row i from the generator of image i."""
        return self._draw(Tensor.normal_, shape)

    def _draw(self, fill: Callable, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
        devices = {generator.device for generator in self.generators}
        if len(devices) > 1:
            rows = (torch.empty(shape, dtype=dtype, device=generator.device) for generator in self.generators)
            return torch.stack([fill(row, generator=g).to(self.device) for row, g in zip(rows, self.generators)])
        drawn = torch.empty(len(self.generators), *shape, dtype=dtype, device=next(iter(devices), self.device))
        for row, generator in zip(drawn, self.generators):  # a tensor for each takes longer than its numbers
            fill(row, generator=generator)
        return drawn.to(self.device)  # at once: each copy to a GPU waits for it
