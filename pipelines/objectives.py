"""What each stage minimises: a batch in, named losses out while training, values per image while evaluating."""

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from pipelines.metrics import CodeCounts, psnr
from prior.base import Prior
from tokenizer.base import Tokenizer


class Objective(nn.Module, ABC):
    """A model with the loss it is trained by; the loop knows nothing else.

    Attributes:
        model: the part that is saved for others.
        best_metric: the value of `forward` in evaluation by which the best model is kept; lower is better.
    """

    model: nn.Module
    best_metric: str = "nll"

    @abstractmethod
    def forward(self, batch: dict, step: int | None = None) -> dict[str, Tensor]:
        """Scalar losses to be summed while training; (B,) values per image while evaluating."""

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
    """A tokenizer's own losses. Values per image: nll (nats/dim of the decoder), mse, psnr (dB)."""

    def __init__(self, tokenizer: Tokenizer):
        super().__init__()
        self.model = tokenizer
        self.train_counts = CodeCounts(tokenizer.spec)
        self.evaluation_counts = CodeCounts(tokenizer.spec)
        self.num_dims = math.prod(tokenizer.config.image_shape)

    def forward(self, batch: dict, step: int | None = None) -> dict[str, Tensor]:
        images = batch["image"]
        output = self.model(images, step)
        if self.training:
            self.train_counts.add(output.codes)
            return output.losses
        self.evaluation_counts.add(output.codes)
        return {
            "nll": self.model.nll(images, output.codes) / self.num_dims,
            "mse": (output.images - images).square().flatten(1).mean(dim=1),
            "psnr": psnr(output.images, images),
        }

    def initialize(self, batch: dict) -> None:
        self.model.initialize(batch["image"])

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
        return self.evaluation_counts.complaints() | self.train_counts.complaints()


class PriorLoss(Objective):
    """A prior's own losses on codes from disk. Value per image: nll in nats per code."""

    def __init__(self, prior: Prior):
        super().__init__()
        self.model = prior

    def forward(self, batch: dict, step: int | None = None) -> dict[str, Tensor]:
        codes = tuple(batch["codes"])
        labels = batch["label"] if self.model.num_classes > 0 else None
        if self.training:
            return self.model(codes, labels)
        with torch.no_grad():
            return {"nll": -self.model.log_prob(codes, labels) / self.model.spec.length}
