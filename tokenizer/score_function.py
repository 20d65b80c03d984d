"""Discrete VAEs trained by score-function estimators: no relaxation, the bits themselves are drawn."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tokenizer.binary_vae import BinaryVAE, BinaryVAEConfig, Posterior, log_bernoulli
from tokenizer.distributed import is_distributed
from tokenizer.latent_networks import Decoded
from tokenizer.latent_vae import importance_weighted


class ScoreFunctionVAE(BinaryVAE):
    """What NVIL, REINFORCE and VIMCO share: log weights of drawn bits."""

    def draw(self, images: Tensor, kl_weight: float, num_draws: int) -> tuple[Tensor, Posterior, Decoded]:
        """Log weights without log Z (B k,), with gradients at fixed bits, for a bound of `num_draws` draws."""

        def draw_bits(logits: Tensor) -> tuple[Tensor, Tensor, None]:
            return logits, (torch.rand_like(logits) < logits.sigmoid()).to(logits.dtype), None

        posterior, features = self.training_pass(images, draw_bits)
        decoded = self.decode_latents(posterior.latents, features)
        log_q = log_bernoulli(posterior.logits, posterior.latents)
        log_p = -self.prior.energy(*self.halves(posterior.latents))
        local = self.local_cost(decoded, kl_weight, num_draws)
        log_weights = kl_weight * (log_p - log_q) - self.distortion(decoded, images) - local
        return log_weights, posterior, decoded


@dataclass(frozen=True, kw_only=True)
class BaselineConfig(BinaryVAEConfig):
    """Configuration of score-function tokenizers with baselines.

    Args:
        baseline_decay: of the running mean and variance of the learning signal, less its baseline.
    """

    baseline_decay: float = 0.9

    def __post_init__(self):
        super().__post_init__()
        if not 0 <= self.baseline_decay < 1:
            raise ValueError(f"baseline_decay must lie in [0, 1), got {self.baseline_decay}")


class REINFORCE(ScoreFunctionVAE):
    """The score-function estimator with a learned baseline, a function of the image (Williams 1992; Mnih & Gregor
    2014, arXiv:1402.0030, section 2.3.1), and a running mean.

    Args:
        config: see `BaselineConfig`.
    """

    Config = BaselineConfig
    normalize_signal = False

    def __init__(self, config: BaselineConfig):
        super().__init__(config)
        num_pixels = self.mean_image.numel()
        self.baseline = nn.Sequential(nn.Flatten(), nn.Linear(num_pixels, 100), nn.Tanh(), nn.Linear(100, 1))
        self.register_buffer("signal_mean", torch.zeros(()))
        self.register_buffer("signal_variance", torch.ones(()))
        # (3,): the signal's mean, its mean square and 1, summed over the passes of a step
        self._pending: Tensor | None = None

    def bound(self, images: Tensor, kl_weight: float) -> tuple[dict[str, Tensor], Posterior, Decoded]:
        log_weights, posterior, decoded = self.draw(images, kl_weight, num_draws=1)  # the mean of k such bounds
        signal = log_weights.detach() - self.signal_mean
        predicted = self.baseline(images - self.mean_image)[:, 0]
        advantage = signal - predicted.detach()
        if self.normalize_signal:
            advantage = advantage / self.signal_variance.sqrt().clamp(min=1)
        losses = {
            "bound_minus_log_partition": -log_weights.mean(),
            "score_function": _surrogate(-advantage * log_bernoulli(posterior.logits, posterior.latents)).mean(),
            "baseline": (signal - predicted).square().mean() / self.signal_variance.clamp(min=1),
            "log_partition": kl_weight * self.prior.log_partition_loss(),
        }
        self._gather(log_weights.detach() - predicted.detach())
        return losses, posterior, decoded

    def _gather(self, signal: Tensor) -> None:
        moments = torch.stack([signal.mean(), signal.square().mean(), signal.new_ones(())])
        self._pending = moments if self._pending is None else self._pending + moments

    @torch.no_grad()
    def after_step(self) -> None:
        """Moves the running mean and variance, once per step and alike on all processes."""
        if self._pending is None:
            return
        pending, self._pending = self._pending, None
        if is_distributed():
            torch.distributed.all_reduce(pending)
        mean, mean_square = pending[:2] / pending[2]  # micro-batches are equally large
        variance = (mean_square - mean.square()).clamp(min=0)
        # Under fp16 a step whose bound overflows is left out by the optimizer, and so it must be here
        is_number = pending.isfinite().all()
        for kept, new in ((self.signal_mean, mean), (self.signal_variance, variance)):
            moved = kept.to(new.dtype).lerp(new, 1 - self.config.baseline_decay)
            kept.copy_(torch.where(is_number, moved, kept.to(new.dtype)))


class NVIL(REINFORCE):
    """NVIL (Mnih & Gregor 2014, arXiv:1402.0030, algorithm 1): the signal, less its baselines, over its deviation.

    That deviation is a running one. One signal serves all groups of bits; local ones (section 2.3.3) are left out.

    Args:
        config: see `BaselineConfig`.
    """

    normalize_signal = True


@dataclass(frozen=True, kw_only=True)
class VIMCOConfig(BinaryVAEConfig):
    """Configuration of `VIMCO`; num_draws is at least 2."""

    num_draws: int = 5

    def __post_init__(self):
        super().__post_init__()
        if self.num_draws < 2:
            raise ValueError(
                f"vimco needs num_draws of at least 2, each the baseline of the others, got {self.num_draws}"
            )


class VIMCO(ScoreFunctionVAE):
    """VIMCO (Mnih & Rezende 2016, arXiv:1602.06725): the k-draw bound, each draw's baseline made of the other draws.

    Args:
        config: see `VIMCOConfig`.
    """

    Config = VIMCOConfig

    def bound(self, images: Tensor, kl_weight: float) -> tuple[dict[str, Tensor], Posterior, Decoded]:
        num_draws = self.config.num_draws
        log_weights, posterior, decoded = self.draw(images, kl_weight, num_draws)
        signal = leave_one_out_signal(log_weights.detach().unflatten(0, (-1, num_draws))).flatten()
        score = signal * log_bernoulli(posterior.logits, posterior.latents)
        losses = {
            "bound_minus_log_partition": importance_weighted(log_weights, num_draws).mean(),
            # per image, not per draw
            "score_function": -_surrogate(score).mean() * num_draws,
            "log_partition": kl_weight * self.prior.log_partition_loss(),
        }
        return losses, posterior, decoded


def leave_one_out_signal(log_weights: Tensor) -> Tensor:
    """Learning signal of each draw, (B, k) to (B, k): the bound, less the bound with that draw's log weight replaced by
    the mean of the others'. It does not change when a constant is added to all log weights."""
    num_draws = log_weights.shape[1]
    others = (log_weights.sum(dim=1, keepdim=True) - log_weights) / (num_draws - 1)
    replaced = log_weights.unsqueeze(1) + torch.diag_embed(others - log_weights)  # row j: draw j replaced
    return log_weights.logsumexp(dim=1, keepdim=True) - replaced.logsumexp(dim=2)


def _surrogate(x: Tensor) -> Tensor:
    """The gradient of x, with the value 0: x itself would only confuse a log."""
    return x - x.detach()
