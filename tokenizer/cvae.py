"""The class-conditional variational autoencoder."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from prior.base import Codes
from tokenizer.base import TokenizerOutput
from tokenizer.gaussian_vae import DiagonalNormal, GaussianVAE, GaussianVAEConfig
from tokenizer.latent_vae import Inferred, Trained, check_at_least


@dataclass(frozen=True, kw_only=True)
class CVAEConfig(GaussianVAEConfig):
    """Configuration of `CVAE`.

    Args:
        num_classes: number of class labels Y, taken from the data.
    """

    num_classes: int

    def __post_init__(self):
        super().__post_init__()
        check_at_least(self, num_classes=1)


class CVAE(GaussianVAE):
    """Conditional variational autoencoder p(x | z, y) p(z) with q(z | x, y), for classes y.

    As M2 of Kingma et al. (2014, arXiv:1406.5298) with all labels known: the bound is one on log p(x | y), and a
    classifier q(y | x) is trained beside it, with which the encoder does without labels. Codes are two levels, the
    class (B, 1) and n real numbers (B, n): decode the same numbers with another class for the same style. As p(y) is
    uniform, draws from q(y | x) q(z | x, y) give a bound on log p(x), the average of p(x | y) over the classes.

    Args:
        config: see `CVAEConfig`.
    """

    Config = CVAEConfig

    def __init__(self, config: CVAEConfig):
        super().__init__(config, num_classes=config.num_classes)

    def forward(self, images: Tensor, step: int | None = None, labels: Tensor | None = None) -> TokenizerOutput:
        """As in the base class; training needs labels (B,)."""
        self.check_images(images)
        if not self.training:
            return self._reconstruct(images)
        if labels is None:
            raise ValueError(f"training is conditional on {self.num_classes} classes: give labels")
        self.prior.check_labels(labels, len(images))
        return self._train_pass(step, images, labels)

    def objective(self, images: Tensor, labels: Tensor, *, step: int | None) -> Trained:
        features = self.features(images)
        logits, q = class_logits(self.network.infer(features, 0, [])), self.posterior(features, labels)
        z = q.draw()
        codes = (labels[:, None], z.detach())
        decoded = self.decode_latents(self._beside(labels, z), features)
        losses, nats = self.bound(images, q, z, decoded, self.kl_weight(step))
        losses["classification"] = F.cross_entropy(logits, labels)
        return Trained(losses, codes, decoded, {"latents z": (nats, self.config.latent_dim)})

    def infer(self, features: Sequence[Tensor], first: Tensor, sample: bool) -> Inferred:
        logits = class_logits(first)
        self.check_encoded(logits)
        log_probs = logits.log_softmax(dim=1)
        labels = torch.multinomial(log_probs.exp(), 1)[:, 0] if sample else log_probs.argmax(dim=1)
        q = self.posterior(features, labels)
        self.check_encoded(*q)
        z = q.draw() if sample else q.mean
        log_q = log_probs.gather(1, labels[:, None])[:, 0] + q.log_prob(z)
        return Inferred((labels[:, None], z), self._beside(labels, z), log_q)

    def posterior(self, features: Sequence[Tensor], labels: Tensor) -> DiagonalNormal:
        """q(z | x, y)."""
        return DiagonalNormal.of(self.network.infer(features, 1, [self._one_hot(labels)]))

    def latents(self, codes: Codes) -> Tensor:
        labels, z = codes
        return self._beside(labels[:, 0], z)

    def log_prior(self, codes: Codes) -> Tensor:
        return self.prior.log_prob(codes, codes[0][:, 0]) - math.log(self.num_classes)

    def _beside(self, labels: Tensor, z: Tensor) -> Tensor:
        return torch.cat([self._one_hot(labels), z.to(self.mean_image.dtype)], dim=1)

    def _one_hot(self, labels: Tensor) -> Tensor:
        return F.one_hot(labels, self.num_classes).to(self.mean_image.dtype)


def class_logits(outputs: Tensor) -> Tensor:
    """Of q(y | x), (B, Y); a group of the network has two outputs per entry, of which one is the logit."""
    return outputs.float().chunk(2, dim=1)[0]
