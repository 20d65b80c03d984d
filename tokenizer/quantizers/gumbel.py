"""Categorical codes trained through a relaxed sample."""

import math

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from prior.base import Codes
from tokenizer.quantizers.base import Quantized, Quantizer, straight_through


class Gumbel(Quantizer):
    """Gumbel-softmax (Jang et al. 2016, arXiv:1611.01144; Maddison et al. 2016, arXiv:1611.00712).

    As in the dVAE of DALL-E (Ramesh et al. 2021, arXiv:2102.12092). The feature map holds the logits of q(c|h), and a
    training pass with a `step` draws from it: codes are the drawn ones, z is the average of the entries under the
    softmax of logits plus Gumbel noise, at a temperature that falls with the step. Evaluation, and training without a
    step, take the most probable code and its entry; in training its gradient is that of the average at the last
    temperature. The KL divergence to the uniform prior is the rate of the codes.

    Args:
        codebook_size: number of entries K, and of channels of the feature map.
        code_dim: width D of an entry.
        kl_weight: weight of the KL divergence, in nats per position. The reconstruction loss is a mean over the C H W
            values of an image: (codes per image) / (C H W) makes the sum a multiple of the evidence bound, that of a
            fixed scale where the loss has none (`normal`: of half the data's variance). 5e-4 is that of VQGAN's code.
        temperature_start: temperature at step 0; 1 is DALL-E's.
        temperature_end: temperature from step decay_steps on; 1/16 is DALL-E's.
        decay_steps: steps over which the temperature falls along half a cosine; 150,000 are DALL-E's.
        straight_through: decode the entry of the drawn code, with the gradient of the average (Jang et al., 2.2).
    Raises:
        ValueError: an argument out of range; features of another shape, or not finite when evaluating.
    """

    is_stochastic = True

    def __init__(
        self,
        codebook_size: int = 512,
        code_dim: int = 64,
        kl_weight: float = 5e-4,
        temperature_start: float = 1.0,
        temperature_end: float = 1 / 16,
        decay_steps: int = 1000,
        straight_through: bool = False,
    ):
        super().__init__()
        if codebook_size < 1 or code_dim < 1:
            raise ValueError(f"codebook_size and code_dim must be at least 1, got {codebook_size} and {code_dim}")
        if not kl_weight >= 0:
            raise ValueError(f"kl_weight must be at least 0, got {kl_weight}")
        if not 0 < temperature_end <= temperature_start:
            raise ValueError(
                f"temperatures must be greater than 0 and must not rise, got temperature_start = {temperature_start} "
                f"and temperature_end = {temperature_end}"
            )
        if decay_steps < 1:
            raise ValueError(f"decay_steps must be at least 1, got {decay_steps}")
        self.in_channels, self.out_channels = codebook_size, code_dim
        self.vocab_sizes = (codebook_size,)
        self.kl_weight, self.straight_through = kl_weight, straight_through
        self.temperature_start, self.temperature_end = temperature_start, temperature_end
        self.decay_steps = decay_steps
        self.codebook = nn.Parameter(torch.randn(codebook_size, code_dim))

    def temperature(self, step: int) -> float:
        remaining = (1 + math.cos(math.pi * min(step / self.decay_steps, 1.0))) / 2
        return self.temperature_end + (self.temperature_start - self.temperature_end) * remaining

    def forward(self, h: Tensor, step: int | None = None) -> Quantized:
        with torch.autocast(h.device.type, enabled=False):  # softmax, averages and losses in float32
            logits = self._logits(h)
            if self.training and step is not None:
                weights = ((logits + gumbel_noise(logits)) / self.temperature(step)).softmax(dim=-1)
                codes = weights.argmax(dim=-1)
                if self.straight_through:
                    weights = straight_through(weights, F.one_hot(codes, weights.shape[-1]).to(weights))
                z = rearrange(weights @ self.codebook.float(), "b h w d -> b d h w")
            elif self.training and torch.is_grad_enabled():
                weights = (logits / self.temperature_end).softmax(dim=-1)
                codes = logits.argmax(dim=-1)
                weights = straight_through(weights, F.one_hot(codes, weights.shape[-1]).to(weights))
                z = rearrange(weights @ self.codebook.float(), "b h w d -> b d h w")
            else:
                codes = logits.argmax(dim=-1)
                z = self.embed((codes,))
            return Quantized(z.to(h.dtype), (codes,), {"kl": self.kl_weight * self._kl(logits)})

    def embed(self, codes: Codes) -> Tensor:
        (codes,) = codes
        return rearrange(F.embedding(codes, self.codebook), "b h w d -> b d h w")

    def encode(self, h: Tensor, sample: bool = False) -> Codes:
        if sample:
            return self.draw(h)[0]
        with torch.autocast(h.device.type, enabled=False):
            return (self._logits(h).argmax(dim=-1),)

    def draw(self, h: Tensor) -> tuple[Codes, Tensor]:
        with torch.autocast(h.device.type, enabled=False):
            logits = self._logits(h)
            codes = (logits + gumbel_noise(logits)).argmax(dim=-1)
            log_q = logits.log_softmax(dim=-1).gather(-1, codes[..., None])
            return (codes,), log_q.flatten(1).sum(dim=1)

    def _logits(self, h: Tensor) -> Tensor:
        self.check_features(h)
        return rearrange(h.float(), "b k h w -> b h w k")

    def _kl(self, logits: Tensor) -> Tensor:
        """KL(q || uniform) = log K - H(q) in nats, mean over positions."""
        log_q = logits.log_softmax(dim=-1)
        return math.log(logits.shape[-1]) + (log_q.exp() * log_q).sum(dim=-1).mean()


def gumbel_noise(like: Tensor) -> Tensor:
    """Draws of the Gumbel distribution: the largest of logits plus these is a draw from their softmax."""
    # contiguous, so that the same seed gives the same noise whatever the layout of the features
    return -torch.empty_like(like, memory_format=torch.contiguous_format).exponential_().log()
