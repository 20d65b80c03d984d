"""Real-valued codes: the standard normal distribution and mixtures of normal distributions."""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from prior.base import Codes, Prior, PriorConfig, check_positive
from prior.sampling import NOT_NUMBERS, check_totals, draw, filter_logits


@dataclass(frozen=True, kw_only=True)
class GaussianMixtureConfig(PriorConfig):
    """Configuration of `GaussianMixture`.

    Args:
        num_components: of the mixture, K; 1 is the standard normal distribution, in which nothing is learned.
    Raises:
        ValueError: no component, a level of integers, or classes that are not the first level of the codes.
    """

    takes_real: ClassVar[bool] = True
    num_components: int = 1

    def __post_init__(self):
        super().__post_init__()
        check_positive(self, "num_components")
        sizes = self.spec.vocab_sizes
        real = sizes[1:] if self.num_classes else sizes
        has_class = (self.spec.shapes[0], sizes[0]) == ((1,), self.num_classes)
        if None in sizes and self.num_classes and not has_class:
            raise ValueError(
                f"a Gaussian mixture with num_classes = {self.num_classes} needs the class as the first level of "
                f"the codes, one integer in [0, {self.num_classes}), got {self.spec}"
            )
        if set(real) != {None}:
            raise ValueError(
                f"a Gaussian mixture is for codes that are real numbers, got {self.spec}; gpt, pixelcnn and pixelsnail "
                "take integers"
            )


class GaussianMixture(Prior):
    """p(z) = sum_k pi_k N(z; m_k, diag s_k^2) over the real numbers z of all levels; log_prob is a log density.

    With one component it is the standard normal distribution of the variational autoencoder (Kingma & Welling 2014,
    arXiv:1312.6114); with more, weights, means and deviations are learned, the mixture that Tomczak & Welling (2018,
    arXiv:1705.07120, section 4) compare with. With classes, the first level of the codes is the class: given the label
    y, codes of another class have no probability, and p(z | y) = p(z).

    Sampling draws the component, whose log weight the temperature divides, then numbers around its mean, whose
    deviation the temperature multiplies. Given numbers count in the component's weight: those that are drawn have their
    distribution given them.

    Attributes:
        logits (K,): of pi; means (K, n) and log_stds (K, n), for the n numbers of all real levels; (1, 1) with one
            component, which is the same for all numbers.
    Args:
        config: code space and number of components.
    """

    Config = GaussianMixtureConfig
    sampling_options = frozenset({"temperature", "given"})

    def __init__(self, config: GaussianMixtureConfig):
        super().__init__(config)
        levels = slice(1 if config.num_classes else 0, None)
        self.lengths, self.shapes = self.spec.lengths[levels], self.spec.shapes[levels]
        num_components, num_dims = config.num_components, sum(self.lengths)
        if num_components == 1:
            # no memory that grows with the code space: a saved folder has no weights that would vouch for its size
            self.register_buffer("logits", torch.zeros(1), persistent=False)
            self.register_buffer("means", torch.zeros(1, 1), persistent=False)
            self.register_buffer("log_stds", torch.zeros(1, 1), persistent=False)
            return
        self.logits = nn.Parameter(torch.zeros(num_components))
        # apart, so that they can part, and near, so that the encoder may choose among all of them
        self.means = nn.Parameter(0.3 * torch.randn(num_components, num_dims))
        self.log_stds = nn.Parameter(torch.zeros(num_components, num_dims))

    def log_prob(self, codes: Codes, labels: Tensor | None = None) -> Tensor:
        self.check_inputs(codes, labels)
        log_prob = self.log_density(self._numbers(codes))
        if labels is not None:
            log_prob = log_prob.masked_fill(codes[0][:, 0] != labels, -math.inf)
        return log_prob

    def log_density(self, z: Tensor) -> Tensor:
        """log p(z) of the numbers of all real levels (B, n) side by side, (B,) nats; differentiable."""
        with torch.autocast(z.device.type, enabled=False):
            log_normals = log_normal(z.float().unsqueeze(1), self.means.float(), self.log_stds.float()).sum(dim=2)
            return (self.logits.float().log_softmax(dim=0) + log_normals).logsumexp(dim=1)

    def _sample(self, num_samples, labels, options, noise, given, callback) -> Codes:
        if given is not None and labels is not None and (given[1][0][:, 0] & (given[0][0][:, 0] != labels)).any():
            raise ValueError("a class among the given codes is not that of its label")
        uniform, normal = noise.uniform(1)[:, 0], noise.normal(sum(self.lengths))
        means, log_stds = self.means.float(), self.log_stds.float()
        weights = self.logits.float().expand(num_samples, -1)
        if given is not None:
            fixed, known = (self._numbers(part) for part in given)
            log_normals = log_normal(fixed.float().unsqueeze(1), means, log_stds)
            # not times `known`: what stands at the other places may be infinitely far
            weights = weights + log_normals.masked_fill(~known.unsqueeze(1), 0.0).sum(dim=2)
        component, total = draw(filter_logits(weights, options), uniform)
        check_totals([total])
        if not (means.isfinite().all() and log_stds.isfinite().all()):
            raise ValueError(NOT_NUMBERS)
        z = means[component] + options.temperature * log_stds[component].exp() * normal
        if given is not None:
            z = torch.where(known, fixed.float(), z)
        callback(sum(self.lengths), sum(self.lengths))
        levels = tuple(part.unflatten(1, shape) for part, shape in zip(z.split(self.lengths, dim=1), self.shapes))
        return levels if labels is None else (labels[:, None], *levels)

    def _numbers(self, codes: Codes) -> Tensor:
        """(B, n): all real levels side by side."""
        return torch.cat([code.flatten(1) for code in codes[-len(self.lengths) :]], dim=1)


def log_normal(x: Tensor, mean: Tensor, log_std: Tensor) -> Tensor:
    """Logarithm of the normal density, elementwise, in nats."""
    return -0.5 * ((x - mean) * (-log_std).exp()).square() - log_std - 0.5 * math.log(2 * math.pi)
