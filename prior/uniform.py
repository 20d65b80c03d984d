"""Every combination of codes equally probable: what a VQ-VAE assumes in stage one, and what every prior must beat."""

import math

import torch
from torch import Tensor

from prior.base import Codes, Prior, PriorConfig, Sampled

# Numbers of float32 that are drawn from [0, 1); of more codes some would never be
FINEST = 2**24


class Uniform(Prior):
    """The uniform distribution: log p(codes) = -sum of log K over all codes, whatever the label.

    It has nothing to learn; its loss is a constant without a gradient. All codes tie, so options that must choose
    between ties (top_k, top_p, temperature 0) are refused, while temperature, min_p and guidance leave the
    distribution as it is.

    Args:
        config: the code space, and the number of classes whose labels are accepted.
    """

    sampling_options = frozenset(
        {
            *("temperature", "min_p", "guidance_scale", "guidance_schedule"),
            *("given", "codes_callback", "return_log_prob"),
        }
    )

    def __init__(self, config: PriorConfig):
        super().__init__(config)
        # Tells `sample` the device: there is no parameter that would.
        self.register_buffer("anchor", torch.empty(0), persistent=False)

    def log_prob(self, codes: Codes, labels: Tensor | None = None) -> Tensor:
        self.check_inputs(codes, labels)
        return torch.full((codes[0].shape[0],), -self.spec.max_nats, device=codes[0].device)

    def log_prob_by_code(self, codes: Codes, labels: Tensor | None = None) -> tuple[Tensor, ...]:
        self.check_inputs(codes, labels)
        return self._log_prob_by_code(codes)

    def _log_prob_by_code(self, codes: Codes) -> tuple[Tensor, ...]:
        return tuple(
            torch.full(code.shape, -math.log(k), device=code.device) for code, k in zip(codes, self.spec.vocab_sizes)
        )

    def _sample(self, num_samples, labels, options, noise, given, callback) -> Codes:
        sizes = zip(self.spec.lengths, self.spec.vocab_sizes)
        vocab_sizes = torch.cat([torch.full((n,), k, device=noise.device) for n, k in sizes])
        # rounding may lift u K to K
        drawn = (noise.uniform(self.spec.length) * vocab_sizes).long().minimum(vocab_sizes - 1)
        if max(self.spec.vocab_sizes) > FINEST:
            drawn = torch.where(vocab_sizes > FINEST, noise.integers(self.spec.length) % vocab_sizes, drawn)
        codes = self.spec.unflatten(drawn)
        if given is not None:
            codes = tuple(torch.where(known, fixed, code) for fixed, known, code in zip(*given, codes))
        callback(self.spec.length, self.spec.length)
        return codes

    def _sample_by_steps(self, num_samples, labels, options, noise, given, callback, codes_callback) -> Sampled:
        codes = self._sample(num_samples, labels, options, noise, given, callback)
        if codes_callback is not None:  # all of them come at once
            arrived = tuple(torch.ones_like(code, dtype=torch.bool) for code in codes)
            codes_callback(tuple(code.clone() for code in codes), arrived)
        log_probs = self._log_prob_by_code(codes)
        if given is not None:
            log_probs = tuple(part.masked_fill(known, 0.0) for part, known in zip(log_probs, given[1]))
        return Sampled(codes, self.spec.flatten(log_probs).sum(dim=1))

    def _check_options(self, options) -> None:
        super()._check_options(options)
        if options.temperature == 0:
            raise ValueError("Uniform cannot honour temperature 0: no code is the most probable; give one above 0")
