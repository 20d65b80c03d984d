"""What priors that predict one code after another share: likelihood, class dropout, guidance, the sampling loop."""

from abc import abstractmethod
from collections.abc import Generator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from prior.base import Codes, Prior, PriorConfig, check_fraction
from prior.sampling import choose


@dataclass(frozen=True, kw_only=True)
class AutoregressiveConfig(PriorConfig):
    """What every autoregressive prior's configuration holds.

    Args:
        class_dropout: probability of training on the null class in place of the label; 0 gives up classifier-free
            guidance. Only matters with classes.
    """

    class_dropout: float = 0.1

    def __post_init__(self):
        super().__post_init__()
        check_fraction(self, "class_dropout")


class AutoregressivePrior(Prior):
    """p(codes | label) = prod_i p(c_i | c_<i, label), levels coarse to fine, each in raster order.

    A subclass writes `logits`, the whole product in one pass, and `steps`, the same one code at a time with a cache; a
    law holds them equal. Classes are labels in [0, num_classes) or the null class, num_classes, which stands for "no
    label": an unconditional prior knows only that one.
    """

    sampling_options = frozenset({"temperature", "top_k", "top_p", "guidance_scale", "given"})

    @abstractmethod
    def logits(self, codes: Codes, classes: Tensor) -> tuple[Tensor, ...]:
        """(B, N_l, K_l) per level: the logits of each code, given the codes before it and the classes (B,)."""

    @abstractmethod
    def steps(self, classes: Tensor) -> Generator[Tensor, Tensor, None]:
        """A Python generator that yields the logits (B, K_l) of the next code and is sent the codes (B,) chosen there.

        `next` gives the logits of the first code. It works in the mode (gradients, dropout) of whoever advances it.
        """

    def forward(self, codes: Codes, labels: Tensor | None = None) -> dict[str, Tensor]:
        """The loss "nll" in nats per code; in training mode a label is dropped with probability class_dropout."""
        self.check_inputs(codes, labels)
        classes = self.classes(labels, codes[0])
        if self.training and labels is not None and self.config.class_dropout > 0:
            dropped = torch.rand(classes.shape, device=classes.device) < self.config.class_dropout
            classes = classes.masked_fill(dropped, self.num_classes)
        return {"nll": -self._log_prob(codes, classes).mean() / self.spec.length}

    def log_prob(self, codes: Codes, labels: Tensor | None = None) -> Tensor:
        self.check_inputs(codes, labels)
        return self._log_prob(codes, self.classes(labels, codes[0]))

    def classes(self, labels: Tensor | None, like: Tensor) -> Tensor:
        """(B,): the labels, or the null class for each row of `like` where there are none."""
        return like.new_full(like.shape[:1], self.num_classes) if labels is None else labels

    def _log_prob(self, codes: Codes, classes: Tensor) -> Tensor:
        # the sum over many codes needs float32, also under autocast
        levels = zip(self.logits(codes, classes), codes)
        nll = [F.cross_entropy(z.float().mT, code.flatten(1), reduction="none").sum(1) for z, code in levels]
        return -torch.stack(nll).sum(0)

    def _sample(self, num_samples, labels, options, noise, given, callback) -> Codes:
        uniform = noise.uniform(self.spec.length)
        classes = self.classes(labels, torch.empty(num_samples, dtype=torch.int64, device=noise.device))
        if options.guided:
            # one pass of twice the batch: with the label, and without
            classes = torch.cat([classes, torch.full_like(classes, self.num_classes)])
        copies = len(classes) // num_samples
        if given is not None:
            fixed, known = self.spec.flatten(given[0]), self.spec.flatten(given[1])
        steps, codes, sent = self.steps(classes), [], None
        for i in range(self.spec.length):
            code = choose(steps.send(sent), options, uniform[:, i])
            if given is not None:
                code = torch.where(known[:, i], fixed[:, i], code)
            codes.append(code)
            sent = code.repeat(copies)
            callback(i + 1, self.spec.length)
        return self.spec.unflatten(torch.stack(codes, dim=1))

    def _check_options(self, options, given) -> None:
        super()._check_options(options, given)
        if options.guided and self.config.class_dropout == 0:
            raise ValueError(
                f"guidance_scale = {options.guidance_scale} needs a prior that also learned to do without labels, "
                f"but this one was trained without class dropout (class_dropout = 0); leave guidance_scale at 1"
            )
