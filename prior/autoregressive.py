"""What priors that predict one code after another share: likelihood, class dropout, guidance, the sampling loop."""

from abc import abstractmethod
from collections.abc import Generator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrize import type_before_parametrizations

from prior.base import PADDING, Codes, Prior, PriorConfig, Sampled, check_fraction, silent
from prior.sampling import check_totals, draw, final_logits, log_prob_of


@dataclass(frozen=True, kw_only=True)
class AutoregressiveConfig(PriorConfig):
    """What every autoregressive prior's configuration holds.

    Args:
        class_dropout: probability of training on the null class in place of the label, or on the empty caption in
            place of the caption; 0 gives up classifier-free guidance. Only matters with classes or captions.
    """

    class_dropout: float = 0.1

    def __post_init__(self):
        super().__post_init__()
        check_fraction(self, "class_dropout")


class AutoregressivePrior(Prior):
    """p(codes | label) = prod_i p(c_i | c_<i, label), levels coarse to fine, each in raster order.

    A subclass writes `logits`, the whole product in one pass, and `steps`, the same one code at a time with a cache; a
    law holds them equal. Classes are labels in [0, num_classes) or the null class, num_classes, which stands for "no
    label": an unconditional prior knows only that one. Where the prior is conditional on captions, they take the place
    of classes, and the empty caption that of the null class.
    """

    sampling_options = frozenset(
        {
            *("temperature", "top_k", "top_p", "min_p", "guidance_scale", "guidance_schedule"),
            *("given", "codes_callback", "return_log_prob"),
        }
    )

    @property
    def learned_unconditional(self) -> bool:
        return self.config.class_dropout > 0

    @abstractmethod
    def logits(self, codes: Codes, classes: Tensor) -> tuple[Tensor, ...]:
        """(B, N_l, K_l) per level: the logits of each code, given the codes before it and the classes (B,).

        With captions, `classes` are their token ids (B, max_text_length), here and in `steps`.
        """

    @abstractmethod
    def steps(self, classes: Tensor) -> Generator[Tensor, Tensor, None]:
        """A Python generator that yields the logits (B, K_l) of the next code and is sent the codes (B,) chosen there.

        `next` gives the logits of the first code; those of the next code may overwrite them. It is advanced without
        gradients, and works in the mode (dropout, autocast) of whoever advances it.
        """

    def forward(self, codes: Codes, labels: Tensor | None = None) -> dict[str, Tensor]:
        """The loss "nll" in nats per code; in training mode a label is dropped with probability class_dropout."""
        self.check_inputs(codes, labels)
        classes = self.classes(labels, codes[0])
        if self.training and labels is not None and self.config.class_dropout > 0:
            dropped = torch.rand(len(classes), device=classes.device) < self.config.class_dropout
            dropped = dropped.unflatten(0, (-1, *[1] * (classes.dim() - 1)))  # (B,) or (B, 1)
            classes = torch.where(dropped, self.null_classes(classes), classes)
        return {"nll": -self._log_prob(codes, classes).mean() / self.spec.length}

    def log_prob(self, codes: Codes, labels: Tensor | None = None) -> Tensor:
        self.check_inputs(codes, labels)
        return self._log_prob(codes, self.classes(labels, codes[0]))

    def log_prob_by_code(self, codes: Codes, labels: Tensor | None = None) -> tuple[Tensor, ...]:
        self.check_inputs(codes, labels)
        return self._log_prob_by_code(codes, self.classes(labels, codes[0]))

    def classes(self, labels: Tensor | None, like: Tensor) -> Tensor:
        """(B,): the labels, or the null class for each row of `like` where there are none."""
        return like.new_full(like.shape[:1], self.num_classes) if labels is None else labels

    def null_classes(self, classes: Tensor) -> Tensor:
        """The null class, or the empty caption, for each row of `classes`."""
        return torch.full_like(classes, PADDING if self.conditional_on_text else self.num_classes)

    def _log_prob(self, codes: Codes, classes: Tensor) -> Tensor:
        levels = [log_probs.flatten(1).sum(1) for log_probs in self._log_prob_by_code(codes, classes)]
        return torch.stack(levels).sum(0)

    def _log_prob_by_code(self, codes: Codes, classes: Tensor) -> tuple[Tensor, ...]:
        # the sum over many codes needs float32, also under autocast
        levels = zip(self.logits(codes, classes), codes)
        return tuple(
            -F.cross_entropy(z.float().mT, code.flatten(1), reduction="none").view(code.shape) for z, code in levels
        )

    def _sample(self, *arguments) -> Codes:
        return self._sample_by_steps(*arguments, None, with_log_prob=False).codes

    def _sample_by_steps(self, *arguments, with_log_prob: bool = True) -> Sampled:
        # operations start a tenth sooner there, which for few images is most of what they cost
        with torch.inference_mode():
            drawn = self._draw_by_steps(*arguments, with_log_prob)
        # nothing that a caller gets may come from there: such tensors are barred from autograd
        return Sampled(tuple(level.clone() for level in drawn.codes), drawn.log_prob.clone())

    def _draw_by_steps(
        self, num_samples, labels, options, noise, given, callback, codes_callback, with_log_prob
    ) -> Sampled:
        """The codes, and the sum of their log-probabilities, or 0 without `with_log_prob`."""
        uniform = noise.uniform(self.spec.length).unbind(1)
        classes = self.classes(labels, torch.empty(num_samples, dtype=torch.int64, device=noise.device))
        if options.guided:
            # one pass of twice the batch: with the label, and without
            classes = torch.cat([classes, self.null_classes(classes)])
        copies, length = len(classes) // num_samples, self.spec.length
        if given is not None:
            fixed, known = (self.spec.flatten(part).unbind(1) for part in given)
        steps, codes, sent = self.steps(classes), [], None
        log_probs, totals = [torch.zeros(num_samples, device=noise.device)], []
        for i in range(length):
            logits = final_logits(steps.send(sent), options, i, length)
            code, total = draw(logits, uniform[i])
            totals.append(total)
            if given is not None:
                code = torch.where(known[i], fixed[i], code)
            if with_log_prob:
                added = log_prob_of(code, logits)
                log_probs.append(added if given is None else added.masked_fill(known[i], 0.0))
            codes.append(code)
            sent = code if copies == 1 else code.repeat(copies)
            if callback is not silent or codes_callback is not None:
                with torch.inference_mode(False), torch.no_grad():
                    callback(i + 1, length)
                    if codes_callback is not None:
                        codes_callback(*self._so_far(codes, given))
        check_totals(totals)
        # added one by one in float32, the rounding of thousands of codes shows; not every device has float64
        log_prob = torch.stack(log_probs).to("cpu", torch.float64).sum(dim=0).to(noise.device, torch.float32)
        return Sampled(self.spec.unflatten(torch.stack(codes, dim=1)), log_prob)

    def _so_far(self, codes: list[Tensor], given) -> tuple[Codes, Codes]:
        """What `codes_callback` is told: the first codes of the sequence and those that are given."""
        first = torch.stack(codes, dim=1)
        sequence = F.pad(first, (0, self.spec.length - len(codes)))
        arrived = F.pad(torch.ones_like(first, dtype=torch.bool), (0, self.spec.length - len(codes)))
        if given is not None:
            fixed, known = self.spec.flatten(given[0]), self.spec.flatten(given[1])
            sequence, arrived = torch.where(known, fixed, sequence), arrived | known
        return self.spec.unflatten(sequence), self.spec.unflatten(arrived)

    def _check_options(self, options) -> None:
        super()._check_options(options)
        if options.guided and not self.learned_unconditional:
            raise ValueError(
                f"guidance_scale = {options.guidance_scale} needs a prior that also learned to do without labels "
                f"or captions, but this one was trained without class dropout (class_dropout = 0); "
                f"leave guidance_scale at 1"
            )


def structure(*networks: nn.Module) -> list[tuple[type, bool, bool]]:
    """Of every layer its type, whether it has a bias, and whether it has hooks or a `forward` of its own.

    Where this is what it was when the networks were built, `steps` may read weights in place of calling layers.
    Elsewhere layers compute more than their weights tell: LoRA and quantization replace or wrap them. Parametrizations,
    such as weight_norm, change nothing here, since to read the weight is to compute it. Hooks that torch calls for
    every module are not seen.
    """
    return [
        (
            type_before_parametrizations(layer),
            layer._parameters.get("bias") is not None,
            bool(layer._forward_hooks or layer._forward_pre_hooks or "forward" in vars(layer)),
        )
        for network in networks
        for name, layer in network.named_modules()
        if "parametrizations" not in name.split(".")
    ]
