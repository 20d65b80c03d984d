"""What each stage minimises: a batch in, named losses out while training, values per image while evaluating."""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from pipelines.codes import CodeDataset
from pipelines.metrics import MOST_COUNTED, CodeCounts, psnr, squared_error
from prior.base import Prior
from tokenizer.base import Tokenizer
from tokenizer.quantizers.base import Quantizer


class Objective(nn.Module, ABC):
    """A model with the loss it is trained by; the loop knows nothing else.

    Attributes:
        model: the part that is saved for others.
    """

    model: nn.Module
    settling_steps: int = 0  # at first, in which nothing that was counted is a complaint yet

    @abstractmethod
    def forward(self, batch: dict, step: int | None = None) -> dict[str, Tensor]:
        """Scalar losses to be summed while training; (B,) values per image while evaluating.

        Among those values is "nll", by which the best model is kept; lower is better.
        """

    def initialize(self, batch: dict) -> None:
        """Called once before the first step, with the same batch of training data on every process."""

    def after_step(self) -> None:
        """Called once after each optimizer step."""

    def start_epoch(self) -> None:
        """Called when the training data begin anew."""

    def start_evaluation(self) -> None:
        """Called before a pass over the validation data."""

    def summary(self) -> dict[str, float]:
        """What was counted over the epoch, or over the validation data in evaluation; equal on all processes."""
        return {}

    def complaints(self) -> dict[str, str]:
        """What is wrong with what was counted, by subject, to be said once each; with numbers and advice."""
        return {}


class TokenizerLoss(Objective):
    """A tokenizer's own losses, its weights laid out for training.

    Values per image: those of `Tokenizer.scores`, mse, psnr (dB).
    """

    def __init__(self, tokenizer: Tokenizer):
        super().__init__()
        # weights like the maps: convolutions otherwise copy them in every pass
        self.model = tokenizer.to(memory_format=torch.channels_last) if tokenizer.channels_last else tokenizer
        self.settling_steps = max(
            (q.settling_steps for q in tokenizer.modules() if isinstance(q, Quantizer)), default=0
        )
        self.train_counts = CodeCounts(tokenizer.spec)
        self.evaluation_counts = CodeCounts(tokenizer.spec)

    def forward(self, batch: dict, step: int | None = None) -> dict[str, Tensor]:
        images = batch["image"]
        labels = (batch["label"],) if self.training and self.model.num_classes > 0 else ()
        output = self.model(images, step, *labels)
        if self.training:
            self.train_counts.add(output.codes)
            return output.losses
        self.evaluation_counts.add(output.codes)
        return {
            **self.model.scores(images, output),
            "mse": squared_error(output.images, images),
            "psnr": psnr(output.images, images),
        }

    def initialize(self, batch: dict) -> None:
        if self.model.starts_from_data:
            self.model.initialize(batch["image"])
            self.model.starts_from_data = False

    def after_step(self) -> None:
        self.model.after_step()
        self.train_counts.merge()

    def start_epoch(self) -> None:
        self.train_counts.reset()

    def start_evaluation(self) -> None:
        self.evaluation_counts.reset()

    def summary(self) -> dict[str, float]:
        if self.training:
            return self.train_counts.summary()
        self.evaluation_counts.merge()
        return self.evaluation_counts.summary()

    def complaints(self) -> dict[str, str]:
        return self.evaluation_counts.complaints() | self.train_counts.complaints() | self.model.complaints()


class PriorLoss(Objective):
    """A prior's own losses on codes from disk.

    Values per image: nll (nats per code) and, where codes are integers, bits_per_image (of all its codes). The summary
    holds, for reference, those of the uniform distribution and of a unigram table, which knows only how often each code
    occurs.

    Args:
        prior: conditional on what the batches hold: "label", or the token ids "text" of captions.
        unigram_nll: nats per code of a unigram table on the validation data, see `unigram_nats_per_code`; None leaves
            it out.
    """

    def __init__(self, prior: Prior, *, unigram_nll: float | None = None):
        super().__init__()
        self.model = prior
        # a density of real numbers has neither
        uniform_nll = prior.spec.max_nats / prior.spec.length if prior.spec.is_discrete else None
        nlls = {"uniform": uniform_nll, "unigram": unigram_nll}
        self.references = {
            f"{name}_{unit}": nll * scale
            for unit, scale in (("nll", 1.0), ("bits_per_image", prior.spec.length / math.log(2)))
            for name, nll in nlls.items()
            if nll is not None
        }

    def forward(self, batch: dict, step: int | None = None) -> dict[str, Tensor]:
        codes, labels = self._inputs(batch)
        if self.training:
            return self.model(codes, labels)
        with torch.no_grad():
            nats = -self.model.log_prob(codes, labels)
        bits = {"bits_per_image": nats / math.log(2)} if self.model.spec.is_discrete else {}
        return {"nll": nats / self.model.spec.length, **bits}

    def initialize(self, batch: dict) -> None:
        self.model.check_inputs(*self._inputs(batch))  # a compiled model looks at no values

    def _inputs(self, batch: dict) -> tuple[tuple[Tensor, ...], Tensor | None]:
        """Codes, and what the model is conditional on."""
        if self.model.conditional_on_text:
            return tuple(batch["codes"]), batch["text"]
        return tuple(batch["codes"]), batch["label"] if self.model.num_classes > 0 else None

    def summary(self) -> dict[str, float]:
        return {} if self.training else dict(self.references)

    def complaints(self) -> dict[str, str]:
        return self.model.complaints()


def unigram_nats_per_code(train_codes: CodeDataset, validation_codes: CodeDataset) -> float:
    """Cross-entropy of the validation codes under how often each code of a level occurs in training, wherever it is.

    Laplace's rule (one count more for each code) leaves no code without probability. A prior that is not below this
    number has learnt nothing of how codes depend on each other, on their place or on a condition.
    """
    spec, nats = train_codes.spec, 0.0
    occurring = occurring_codes(validation_codes)
    train_counts, validation_counts = (code_counts(codes, occurring) for codes in (train_codes, validation_codes))
    for vocab_size, length, train, validation in zip(spec.vocab_sizes, spec.lengths, train_counts, validation_counts):
        total = float(len(train_codes) * length + vocab_size)  # as an integer it may exceed int64
        probabilities = (train + 1) / total
        nats -= (validation * probabilities.log()).sum().item()
    return nats / (len(validation_codes) * spec.length)


def occurring_codes(codes: CodeDataset) -> list[Tensor]:
    """The distinct codes of each level, ascending: a table of all K_l might not fit into memory."""
    return [torch.cat(parts).unique() for parts in zip(*([c.unique() for c in batch] for batch in _batches(codes)))]


def code_counts(codes: CodeDataset, of: list[Tensor]) -> list[Tensor]:
    """How often each of the given codes occurs, which ascend: float64, of their shapes (n_l,)."""
    counts = [torch.zeros(len(values), dtype=torch.float64) for values in of]
    for batch in _batches(codes):
        for total, values, level, vocab_size in zip(counts, of, batch, codes.spec.vocab_sizes):
            if vocab_size <= MOST_COUNTED:  # an order of magnitude faster
                total += level.bincount(minlength=vocab_size)[values]
                continue
            places = torch.searchsorted(values, level).clamp(max=len(values) - 1)
            total += places[values[places] == level].bincount(minlength=len(values))
    return counts


def _batches(codes: CodeDataset, rows: int = 65536) -> Iterator[list[Tensor]]:
    """The codes of `rows` images at a time, each level flattened."""
    for start in range(0, len(codes), rows):
        batch = codes.__getitems__(range(start, min(start + rows, len(codes))))
        yield [level.flatten() for level in batch["codes"]]
