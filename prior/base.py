"""What a distribution over codes is: the space (`CodeSpec`), the contract (`Prior`) and its options."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from numbers import Integral
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from prior.sampling import GuidanceSchedule, ImageNoise, SamplingOptions

Codes = tuple[Tensor, ...]

PADDING = -1  # follows the token ids of a caption up to max_text_length; a caption of nothing else is the empty one


@dataclass(frozen=True)
class CodeSpec:
    """The space that codes live in: one array per level, coarse to fine, of integers or of real numbers.

    Args:
        shapes: shape of each level without the batch, e.g. ((8, 8),), ((32, 32), (64, 64)) or ((200,),).
        vocab_sizes: number K of values of each level; the entries of level l are integers in [0, K_l). None where they
            are real numbers, as in a Gaussian variational autoencoder; log-probabilities are then log densities.
    Raises:
        ValueError: no level, a level without a vocabulary, or a size below 1.
    """

    shapes: tuple[tuple[int, ...], ...]
    vocab_sizes: tuple[int | None, ...]

    def __post_init__(self):
        # JSON and YAML give lists
        try:
            shapes = tuple(tuple(map(_whole, shape)) for shape in self.shapes)
            vocab_sizes = tuple(map(_whole, self.vocab_sizes))
        except TypeError as error:
            raise ValueError(
                "a code space has one shape and one vocabulary size per level, such as ((8, 8),) and (512,), "
                f"got {self.shapes} and {self.vocab_sizes}"
            ) from error
        object.__setattr__(self, "shapes", shapes)
        object.__setattr__(self, "vocab_sizes", vocab_sizes)
        if not self.shapes or len(self.shapes) != len(self.vocab_sizes):
            raise ValueError(
                f"a code space needs one vocabulary size per level and at least one level, "
                f"got shapes {self.shapes} and vocab_sizes {self.vocab_sizes}"
            )
        vocab_sizes = [vocab_size for vocab_size in self.vocab_sizes if vocab_size is not None]
        sizes = [*vocab_sizes, *(size for shape in self.shapes for size in shape)]
        if any(not isinstance(size, int) or size < 1 for size in sizes) or not all(self.shapes):
            raise ValueError(f"code sizes must be integers of at least 1, got {self}")

    @property
    def num_levels(self) -> int:
        return len(self.shapes)

    @property
    def lengths(self) -> tuple[int, ...]:
        """Codes per image of each level."""
        return tuple(math.prod(shape) for shape in self.shapes)

    @property
    def length(self) -> int:
        """Codes per image, N."""
        return sum(self.lengths)

    @property
    def is_discrete(self) -> bool:
        """Whether the codes of every level are integers."""
        return None not in self.vocab_sizes

    @property
    def max_nats(self) -> float:
        """Nats per image under the uniform distribution: sum of log K over all codes; infinite for real numbers."""
        return sum(n * (math.inf if k is None else math.log(k)) for n, k in zip(self.lengths, self.vocab_sizes))

    def check_discrete(self, who: str) -> None:
        """Raises ValueError, which says `who` asks, unless the codes of every level are integers."""
        if not self.is_discrete:
            raise ValueError(
                f"{who} takes integer codes, but level {self.vocab_sizes.index(None)} of {self} holds real numbers; "
                "only the prior 'gaussian_mixture', which is learned with a tokenizer, takes these"
            )

    def check(self, codes: Codes) -> None:
        """Raises ValueError if `codes` are not arrays of this space: shapes, range, int64 or a floating-point type.

        Compiled code does not look at values: on a GPU that would keep each training step waiting.
        """
        if not isinstance(codes, Sequence):
            raise ValueError(
                f"codes must be a tuple with one tensor for each level ({self.num_levels}), got {type(codes).__name__}"
            )
        if len(codes) != self.num_levels:
            raise ValueError(f"got codes of {len(codes)} levels, this code space has {self.num_levels}: {self}")
        for level, (code, shape, vocab_size) in enumerate(zip(codes, self.shapes, self.vocab_sizes)):
            if not isinstance(code, Tensor):
                raise ValueError(f"level {level} of the codes must be a tensor, got {type(code).__name__}")
            of_type = code.is_floating_point() if vocab_size is None else code.dtype == torch.int64
            if tuple(code.shape[1:]) != shape or not of_type:
                raise ValueError(
                    f"level {level} of the codes must be {'floating-point' if vocab_size is None else 'int64'} "
                    f"of shape (batch, {', '.join(map(str, shape))}), got {code.dtype} of shape {tuple(code.shape)}"
                )
            if torch.compiler.is_compiling():
                continue
            if vocab_size is None:
                if not code.isfinite().all():
                    raise ValueError(f"level {level} of the codes must hold finite numbers, got nan or inf")
            elif code.numel() and (code.min() < 0 or code.max() >= vocab_size):
                raise ValueError(
                    f"level {level} of the codes must lie in [0, {vocab_size}), "
                    f"got values from {code.min().item()} to {code.max().item()}"
                )
        batches = [code.shape[0] for code in codes]
        if len(set(batches)) > 1:
            raise ValueError(f"all levels must hold the same number of images, got {batches}")

    def flatten(self, codes: Codes) -> Tensor:
        """(B, N): all levels as one sequence, coarse to fine, each in raster order."""
        return torch.cat([code.flatten(1) for code in codes], dim=1)

    def unflatten(self, sequence: Tensor) -> Codes:
        """The inverse of `flatten`."""
        parts = sequence.split(self.lengths, dim=1)
        return tuple(part.unflatten(1, shape) for part, shape in zip(parts, self.shapes))


def _whole(size):
    """An integer of any kind, such as NumPy's, as Python's; anything else as it is."""
    return int(size) if isinstance(size, Integral) and not isinstance(size, bool) else size


@dataclass(frozen=True, kw_only=True)
class PriorConfig:
    """What every prior's configuration holds.

    Args:
        spec: the code space, taken from the codes.
        num_classes: number of class labels; 0 for a prior without classes.
        text_vocab_size: number of token ids that captions are made of; 0 for a prior without captions.
        max_text_length: tokens of the longest caption; captions are padded to it.
        tokenizer_fingerprint: hash of the tokenizer whose codes the prior was trained on.
        text_tokenizer_fingerprint: hash of the text tokenizer that made the token ids of its captions.
    Raises:
        ValueError: a number below 0, both classes and captions, only one of the two sizes of captions, or codes that
            are real numbers where the subclass does not set `takes_real`.
    """

    takes_real: ClassVar[bool] = False
    spec: CodeSpec
    num_classes: int = 0
    text_vocab_size: int = 0
    max_text_length: int = 0
    tokenizer_fingerprint: str = ""
    text_tokenizer_fingerprint: str = ""

    def __post_init__(self):
        if not self.takes_real:
            self.spec.check_discrete(f"prior {type(self).__name__.removesuffix('Config')}")
        if self.num_classes < 0:
            raise ValueError(f"num_classes must be at least 0 (0: unconditional), got {self.num_classes}")
        sizes = (self.text_vocab_size, self.max_text_length)
        if min(sizes) < 0 or (min(sizes) == 0) != (max(sizes) == 0):
            raise ValueError(
                "text_vocab_size and max_text_length must both be at least 1, or both 0 for a prior without captions, "
                f"got {sizes[0]} and {sizes[1]}"
            )
        if self.num_classes > 0 and self.text_vocab_size > 0:
            raise ValueError(
                f"a prior is conditional on classes or on captions, got num_classes = {self.num_classes} and "
                f"text_vocab_size = {self.text_vocab_size}; leave one of them at 0"
            )


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Evaluation mode; afterwards each submodule has its own mode again, since some may be frozen."""
    in_training = [part for part in module.modules() if part.training]
    module.eval()
    try:
        yield
    finally:
        for part in in_training:
            part.training = True


def silent(done: int, total: int) -> None:
    """The `callback` of a caller who gave none."""


def _check_tensor(name: str, value) -> None:
    if not isinstance(value, Tensor):
        raise ValueError(
            f"{name} must be an int64 tensor, got {type(value).__name__}: wrap them in torch.tensor([...])"
        )


def check_positive(config: PriorConfig, *names: str) -> None:
    """Raises ValueError unless the named fields are finite and at least 1."""
    for name in names:
        if not 1 <= getattr(config, name) < math.inf:
            raise ValueError(f"{name} must be at least 1, got {getattr(config, name)}")


def check_fraction(config: PriorConfig, *names: str) -> None:
    """Raises ValueError unless the named fields lie in [0, 1)."""
    for name in names:
        if not 0 <= getattr(config, name) < 1:
            raise ValueError(f"{name} is a probability in [0, 1), got {getattr(config, name)}")


class Sampled(NamedTuple):
    """What `Prior.sample` returns with return_log_prob.

    codes: one tensor (B, *shape) per level; log_prob: (B,) nats, the log-probability with which these codes were
    drawn. It is that of the distribution that the sampling options make, not the prior's own, which `Prior.log_prob`
    gives; codes that were given were not drawn and count nothing.
    """

    codes: Codes
    log_prob: Tensor


class Prior(nn.Module, ABC):
    """A distribution p(codes), p(codes | class) or p(codes | caption) over a `CodeSpec`.

    A subclass sets `Config`, names the sampling options it honours, and writes `log_prob` and `_sample`.
    Labels are what the prior is conditional on, given if and only if it is: (B,) classes in [0, num_classes) where
    `num_classes > 0`; (B, max_text_length) token ids of captions in [0, text_vocab_size), followed by `PADDING`, where
    `conditional_on_text`, which only a subclass that sets `takes_text` can be. All int64.
    """

    Config: type[PriorConfig] = PriorConfig
    takes_text: bool = False
    learned_unconditional: bool = True  # whether one that is conditional also draws without its label or caption
    sampling_options: frozenset[str] = frozenset()

    def __init__(self, config: PriorConfig):
        super().__init__()
        self.config = config
        self.spec = config.spec
        self.num_classes = config.num_classes
        self.conditional_on_text = config.text_vocab_size > 0
        if self.conditional_on_text and not self.takes_text:
            raise ValueError(f"{type(self).__name__} cannot be conditional on captions; take the prior 'gpt'")

    @classmethod
    def from_pretrained(cls, path_or_id: str, **options) -> "Prior":
        """Loads a model folder or hub repository, in evaluation mode.

        Args:
            path_or_id: folder, or "user/name" on the hub.
            options: subfolder ("prior" where it is a pipeline's); device (default the CPU); dtype or
                its name (default, and "auto", as saved); revision, cache_dir, token, local_files_only and
                force_download for the hub.
        Raises:
            ValueError: it is damaged, or holds another class.
        """
        from pipelines.checkpoint import load_pretrained  # for convenience, here alone: models know no files

        return load_pretrained(cls, path_or_id, **options)

    def save_pretrained(self, folder: str) -> None:
        """Writes a model folder: config.json and model.safetensors."""
        from pipelines.checkpoint import save_model

        save_model(self, folder)

    def forward(self, codes: Codes, labels: Tensor | None = None) -> dict[str, Tensor]:
        """Named training losses whose sum is minimised: here the negative log-likelihood in nats per code."""
        return {"nll": -self.log_prob(codes, labels).mean() / self.spec.length}

    def complaints(self) -> dict[str, str]:
        """What is wrong with how it learns, by subject; with numbers and advice."""
        return {}

    @abstractmethod
    def log_prob(self, codes: Codes, labels: Tensor | None = None) -> Tensor:
        """log p(codes | labels) in nats, shape (B,). Never drops the condition, whatever the training mode."""

    def log_prob_by_code(self, codes: Codes, labels: Tensor | None = None) -> tuple[Tensor, ...]:
        """(B, *shape) per level, in nats: the share of each code in `log_prob`, given the codes that come before it.

        Raises:
            ValueError: this prior does not predict one code after another.
        """
        raise ValueError(
            f"{type(self).__name__} does not predict one code after another, so single codes have no log-probability; "
            "take log_prob for all of them together"
        )

    @torch.no_grad()
    def sample(
        self,
        num_samples: int,
        labels: Tensor | None = None,
        *,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        guidance_scale: float = 1.0,
        guidance_schedule: GuidanceSchedule = "constant",
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        given: tuple[Codes, Codes] | None = None,
        callback: Callable[[int, int], None] | None = None,
        codes_callback: Callable[[Codes, Codes], None] | None = None,
        return_log_prob: bool = False,
    ) -> Codes | Sampled:
        """Draws codes.

        Args:
            num_samples: number of images B.
            labels: (B,) class labels or (B, max_text_length) token ids of captions, if and only if the prior is
                conditional on one of them; see the class.
            temperature: divides the logits; 0 takes the most probable code each time.
            top_k: keep only the k most probable codes at each position.
            top_p: keep the smallest set of codes whose probability reaches p (nucleus sampling).
            min_p: keep the codes at least min_p times as probable as the most probable one (Nguyen et al. 2024,
                arXiv:2407.01082). Filters act in the order temperature, top_k, top_p, min_p, as in `transformers`.
            guidance_scale: classifier-free guidance (Ho & Salimans 2022); 1 is off.
            guidance_schedule: "constant"; "linear", from 1 at the first code to guidance_scale at the last, as in MUSE
                (Chang et al. 2023, arXiv:2301.00704) and VAR (Tian et al. 2024, arXiv:2404.02905); or (start, end):
                guidance_scale for the codes from the fraction `start` of the sequence up to, not including, `end`, and
                1 elsewhere, after the limited interval of Kynkaanniemi et al. 2024 (arXiv:2404.07724). The sequence is
                that of all levels, coarse to fine.
            generator: one for the batch, or one per image. Image i then depends on its own generator alone,
                whatever the batch size. None takes fresh seeds from torch's default generator.
            given: (codes, known) per level: codes kept where the boolean `known` is true (completion).
            callback: called as callback(done, total) while the codes arrive.
            codes_callback: called as codes_callback(codes, arrived) after each step, with the codes so far (0 where
                there is none yet) and per level a boolean mask of those that are there. They are the callback's to
                keep.
            return_log_prob: whether to return the log-probability of each draw too.
        Returns:
            one tensor (B, *shape) per level; with return_log_prob a `Sampled` of them and log_prob (B,).
        Raises:
            ValueError: an option out of range, or one that this prior cannot honour.
        """
        if not isinstance(num_samples, Integral):
            raise ValueError(f"num_samples must be an integer, got {num_samples!r}")
        if num_samples < 1:
            raise ValueError(f"num_samples must be at least 1, got {num_samples}")
        options = SamplingOptions(temperature, top_k, top_p, min_p, guidance_scale, guidance_schedule)
        extras = {"given": given is not None, "codes_callback": codes_callback is not None,
                  "return_log_prob": return_log_prob}  # fmt: skip
        self._check_supported(options.names_set() | {name for name, asked in extras.items() if asked})
        self._check_options(options)
        self.check_labels(labels, num_samples)
        device = next(chain(self.parameters(), self.buffers()), torch.empty(0)).device
        if labels is not None:
            labels = labels.to(device)
        if given is not None:
            given = self._check_given(given, num_samples, device)
        noise = ImageNoise(num_samples, generator, device)
        arguments = (num_samples, labels, options, noise, given, callback or silent)
        with evaluating(self):
            if not return_log_prob and codes_callback is None:
                return self._sample(*arguments)
            sampled = self._sample_by_steps(*arguments, codes_callback)
            return sampled if return_log_prob else sampled.codes

    @abstractmethod
    def _sample(
        self,
        num_samples: int,
        labels: Tensor | None,
        options: SamplingOptions,
        noise: ImageNoise,
        given: tuple[Codes, Codes] | None,
        callback: Callable[[int, int], None],
    ) -> Codes:
        """`sample` with everything checked, labels and given codes on the prior's device, in evaluation mode."""

    def _sample_by_steps(
        self, num_samples, labels, options, noise, given, callback, codes_callback: Callable | None
    ) -> Sampled:
        """`_sample` of the priors that name "return_log_prob" and "codes_callback" among their options."""
        raise NotImplementedError(
            f"{type(self).__name__} names 'return_log_prob' or 'codes_callback' in sampling_options, "
            "but does not write _sample_by_steps, which makes them"
        )

    def check_inputs(self, codes: Codes, labels: Tensor | None) -> None:
        """Raises ValueError unless the codes are of this prior's space and the labels fit them."""
        self.spec.check(codes)
        self.check_labels(labels, codes[0].shape[0])

    def check_labels(self, labels: Tensor | None, num_samples: int) -> None:
        """Raises ValueError unless labels are given exactly when they are needed, in number and range.

        Compiled code does not look at their range, as in `CodeSpec.check`.
        """
        if self.conditional_on_text:
            self._check_text(labels, num_samples)
            return
        if self.num_classes == 0:
            if labels is not None:
                raise ValueError("this prior is unconditional (num_classes = 0), but labels were given")
            return
        if labels is None:
            raise ValueError(f"this prior is conditional on {self.num_classes} classes: give labels")
        _check_tensor("labels", labels)
        if labels.shape != (num_samples,) or labels.dtype != torch.int64:
            raise ValueError(
                f"labels must be int64 of shape ({num_samples},), got {labels.dtype} of shape {tuple(labels.shape)}"
            )
        looked_at = not torch.compiler.is_compiling() and labels.numel() > 0
        if looked_at and (labels.min() < 0 or labels.max() >= self.num_classes):
            raise ValueError(
                f"labels must lie in [0, {self.num_classes}), "
                f"got values from {labels.min().item()} to {labels.max().item()}"
            )

    def _check_text(self, labels: Tensor | None, num_samples: int) -> None:
        length, vocab_size = self.config.max_text_length, self.config.text_vocab_size
        if labels is None:
            raise ValueError("this prior is conditional on captions: give the token ids of one for each image")
        _check_tensor("captions", labels)
        if labels.shape != (num_samples, length) or labels.dtype != torch.int64:
            raise ValueError(
                f"captions must be int64 of shape ({num_samples}, {length}), "
                f"got {labels.dtype} of shape {tuple(labels.shape)}"
            )
        if torch.compiler.is_compiling() or not labels.numel():
            return
        if labels.min() < PADDING or labels.max() >= vocab_size:
            raise ValueError(
                f"token ids of captions must lie in [0, {vocab_size}), or be {PADDING} for padding, "
                f"got values from {labels.min().item()} to {labels.max().item()}"
            )
        padding = labels == PADDING
        if (padding[:, :-1] & ~padding[:, 1:]).any():
            raise ValueError(f"padding ({PADDING}) may only stand after the last token of a caption")

    def _check_supported(self, asked: set[str]) -> None:
        unsupported = sorted(asked - self.sampling_options)
        if unsupported:
            raise ValueError(
                f"{type(self).__name__} cannot honour {', '.join(unsupported)}; "
                f"it supports {', '.join(sorted(self.sampling_options)) or 'no sampling options'}"
            )

    def _check_options(self, options: SamplingOptions) -> None:
        if options.guidance_scale != 1.0 and self.num_classes == 0 and not self.conditional_on_text:
            raise ValueError(
                f"guidance_scale = {options.guidance_scale} needs a prior that is conditional on classes or captions; "
                "this one is unconditional"
            )

    def _check_given(self, given, num_samples: int, device) -> tuple[Codes, Codes]:
        if not isinstance(given, Sequence) or len(given) != 2:
            raise ValueError(
                "given must be a pair: a tuple of codes and a tuple of boolean masks of those that are known, "
                f"got {type(given).__name__}{f' of {len(given)}' if isinstance(given, Sequence) else ''}"
            )
        codes, known = given
        self.spec.check(codes)
        if not isinstance(known, Sequence) or not all(isinstance(mask, Tensor) for mask in known):
            raise ValueError("given needs one boolean mask per level, each a tensor of the shape of its codes")
        codes, known = (tuple(part.to(device) for part in parts) for parts in given)
        if len(known) != len(codes) or any(k.shape != c.shape or k.dtype != torch.bool for k, c in zip(known, codes)):
            shapes = [tuple(mask.shape) for mask in known]
            raise ValueError(f"given needs one boolean mask per level, each of the shape of its codes, got {shapes}")
        if codes[0].shape[0] != num_samples:
            raise ValueError(f"given holds {codes[0].shape[0]} images, num_samples is {num_samples}")
        return codes, known
