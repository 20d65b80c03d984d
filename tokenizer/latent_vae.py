"""Variational autoencoders over a `LatentNetwork`: what those with binary, Gaussian and categorical latents share.

Networks, likelihood, evaluation, encoding and decoding are one and the same for all, to compare them at equal networks.

Letters: k draws per image.
"""

import math
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from prior.base import Codes, CodeSpec
from prior.sampling import ImageNoise
from tokenizer.base import PosteriorDraw, Tokenizer, TokenizerConfig, TokenizerOutput
from tokenizer.distributed import mean_over_processes
from tokenizer.latent_networks import LATENT_NETWORKS, Decoded, LocalGroup, Noise
from tokenizer.likelihoods import LIKELIHOODS
from tokenizer.quantizers.base import check_finite
from tokenizer.registry import build

# A group of latents that costs less than this share of a nat per latent carries next to nothing
COLLAPSED_NATS_PER_LATENT = 0.005


@dataclass(frozen=True, kw_only=True)
class LatentVAEConfig(TokenizerConfig):
    """What the configurations of variational autoencoders hold.

    Args:
        network: encoder and decoder, {"type": name, **options}.
        likelihood: p(x | z), {"type": name, **options}.
        num_draws: draws of z per image in training, k.
        kl_warmup_steps: steps over which the weight of the KL term rises from 0 to its value.
        local_kl_start: the weight that the KL of the decoder's own local latents goes to 1 from, over the same steps.
            From 0 it rises as that of the others. Above 1 the local latents are dear until the others have learned what
            they can; otherwise those, which are harder to learn, are often left with nothing to tell. Without
            kl_warmup_steps it has no part in training.
        weight_decay: of kernels and of the gains of batch norms; half its product with the squared norm is added to
            the loss.
    """

    network: dict = field(default_factory=lambda: {"type": "mlp"})
    likelihood: dict = field(default_factory=lambda: {"type": "bernoulli"})
    num_draws: int = 1
    kl_warmup_steps: int = 0
    local_kl_start: float = 0.0
    weight_decay: float = 1e-4

    def __post_init__(self):
        super().__post_init__()
        check_at_least(self, num_draws=1, kl_warmup_steps=0, local_kl_start=0, weight_decay=0)


def check_at_least(config: TokenizerConfig, **least: float) -> None:
    """Raises ValueError unless the named fields are finite and at least as large."""
    for name, bound in least.items():
        if not bound <= getattr(config, name) < float("inf"):
            raise ValueError(f"{name} must be at least {bound}, got {getattr(config, name)}")


class Inferred(NamedTuple):
    """Codes of images, what the decoder takes for them (B, N), and log q(codes | x) (B,) in nats."""

    codes: Codes
    latents: Tensor
    log_q: Tensor


class Trained(NamedTuple):
    """What a pass of `LatentVAE.objective` gives.

    losses: scalars whose sum is minimised, in nats per image; codes: per level, for each row; decoded: the decoder's
    output; nats: by name of a group of latents, its KL in nats per image, a mean over the batch, and their number.
    """

    losses: dict[str, Tensor]
    codes: Codes
    decoded: Decoded
    nats: dict[str, tuple[Tensor, int]]


class LatentVAE(Tokenizer):
    """q(z | x), p(x | z) and a prior p(z), all learned together.

    A subclass names `outputs_per_latent` and adds the "prior" to `parts`; it writes `objective`, `infer`, `latents`.

    Args:
        config: sizes and parts; a subclass's has the field "prior" too.
        spec: the code space.
        group_sizes: latents of each group, as the networks see them.
        implied: what of the prior's configuration the model determines, beside the code space.
    Raises:
        ValueError: an unknown part, or an option that a part does not have.
    """

    Config: type[LatentVAEConfig]
    parts: ClassVar = {"network": LATENT_NETWORKS, "likelihood": LIKELIHOODS}
    outputs_per_latent = 1

    def __init__(self, config: LatentVAEConfig, spec: CodeSpec, group_sizes: Sequence[int], **implied):
        super().__init__(config)
        self.spec = spec
        self.likelihood = build("likelihood", LIKELIHOODS, config.likelihood, image_channels=config.image_shape[0])
        self.network = build(
            "network",
            LATENT_NETWORKS,
            config.network,
            image_shape=config.image_shape,
            group_sizes=list(group_sizes),
            outputs_per_latent=self.outputs_per_latent,
            params_channels=self.likelihood.num_channels,
        )
        self.prior = build("prior", self.parts["prior"], config.prior, spec=spec, **implied)
        self.register_buffer("mean_image", torch.full(config.image_shape, 0.5))
        self.nats_by_group: dict[str, tuple[Tensor, int]] = {}
        self._local_groups: set[str] = set()
        self._kl_weight = 1.0  # in the last training pass

    @property
    def has_local_latents(self) -> bool:
        return self.network.has_local

    # Of a subclass
    # --------------------------------------------------------------------------------------------

    @abstractmethod
    def objective(self, images: Tensor, *, step: int | None) -> Trained:
        """One pass of training; images (B k, C, H, W), each image k times in a row."""

    @abstractmethod
    def infer(self, features: Sequence[Tensor], first: Tensor, sample: bool) -> Inferred:
        """A draw from q(z | x), or what `encode` takes for its mode; `first` is the network's output for group 0."""

    @abstractmethod
    def latents(self, codes: Codes) -> Tensor:
        """(B, N): what the decoder takes for codes."""

    # The model
    # --------------------------------------------------------------------------------------------

    def forward(self, images: Tensor, step: int | None = None) -> TokenizerOutput:
        """Training: one pass of the objective. Evaluation: the reconstruction from `encode`, without losses."""
        self.check_images(images)
        return self._train_pass(step, images) if self.training else self._reconstruct(images)

    @torch.no_grad()
    def encode(self, images: Tensor, sample: bool = False) -> Codes:
        self.check_images(images)
        features = self.features(images)
        return self.infer(features, self.network.infer(features, 0, []), sample).codes

    @torch.no_grad()
    def decode(self, codes: Codes, generator: torch.Generator | Sequence[torch.Generator] | None = None) -> Tensor:
        self.spec.check(codes)
        noise = None
        if self.has_local_latents:
            of_images = ImageNoise(len(codes[0]), generator, codes[0].device)

            def noise(like: Tensor) -> Tensor:
                return of_images.normal(*like.shape[1:])

        return self.likelihood.mean(self.decode_latents(self.latents(codes), noise=noise).params)

    def nll(self, images: Tensor, codes: Codes) -> Tensor:
        """-log p(x | codes) in nats, (B,); an upper bound, from one draw, where the decoder has its own latents."""
        self.check_images(images)
        self.spec.check(codes)
        decoded = self.decode_latents(self.latents(codes), self.features(images))
        return self.likelihood.nll(decoded.params, images) + local_kl(decoded.local)

    def draw_posterior(self, images: Tensor) -> PosteriorDraw:
        return next(self.draw_posteriors(images, 1))

    def draw_posteriors(self, images: Tensor, num_draws: int) -> Iterator[PosteriorDraw]:
        self.check_images(images)
        with torch.no_grad():
            features = self.features(images)
            first = self.network.infer(features, 0, [])
        for _ in range(num_draws):
            yield self._draw(images, features, first)

    @torch.no_grad()
    def _draw(self, images: Tensor, features: Sequence[Tensor], first: Tensor) -> PosteriorDraw:
        codes, latents, log_q = self.infer(features, first, sample=True)
        decoded = self.decode_latents(latents, features)
        log_likelihood = -self.likelihood.nll(decoded.params, images)
        return PosteriorDraw(codes, log_q, log_likelihood + sum(group.log_ratio for group in decoded.local.values()))

    @torch.no_grad()
    def scores(self, images: Tensor, output: TokenizerOutput) -> dict[str, Tensor]:
        """nll in nats/dim, here the one-draw bound on -log p(x) with all of its parts in nats beside it."""
        draw = self.draw_posterior(images)
        rate = draw.log_q - self.log_prior(draw.codes)
        negative_elbo = rate - draw.log_likelihood
        return {
            "nll": negative_elbo / images.shape[1:].numel(),
            "negative_elbo": negative_elbo,
            "distortion": -draw.log_likelihood,
            "kl": rate,
        }

    def log_prior(self, codes: Codes) -> Tensor:
        """log p(codes) in nats, (B,)."""
        return self.prior.log_prob(codes)

    def embed(self, codes: Codes) -> tuple[Tensor, ...]:
        self.spec.check(codes)
        return (self.latents(codes)[:, :, None, None],)

    @torch.no_grad()
    def decode_embedded(self, vectors: tuple[Tensor, ...]) -> Tensor:
        """As in the base class; latents of the decoder's own take their means."""
        return self.likelihood.mean(self.decode_latents(vectors[0].flatten(1), noise=None).params)

    # Training
    # --------------------------------------------------------------------------------------------

    @torch.no_grad()
    def initialize(self, images: Tensor) -> None:
        self.mean_image.copy_(images.mean(dim=0))

    def kl_weight(self, step: int | None) -> float:
        """Linear warm-up (Bowman et al. 2016, arXiv:1511.06349); 1 without a step."""
        if step is None or self.config.kl_warmup_steps == 0:
            return 1.0
        return min(1.0, (step + 1) / self.config.kl_warmup_steps)

    def local_kl_weight(self, kl_weight: float) -> float:
        """The weight of the local latents' KL where that of the others is `kl_weight`."""
        return self.config.local_kl_start + (1 - self.config.local_kl_start) * kl_weight

    def local_cost(self, decoded: Decoded, kl_weight: float, num_draws: int) -> Tensor | float:
        """What the local latents cost in a log weight of the `num_draws`-draw bound, (B,) weighted nats."""
        return self.local_kl_weight(kl_weight) * local_rate(decoded.local, num_draws)

    def local_losses(self, decoded: Decoded, kl_weight: float) -> dict[str, Tensor]:
        """The loss "local_kl" of a bound whose KL terms are analytic; none without local latents."""
        if not decoded.local:
            return {}
        return {"local_kl": balanced_kl(decoded.local, self.local_kl_weight(kl_weight)).mean()}

    def complaints(self) -> dict[str, str]:
        """Groups of latents that carry nothing; local ones need not while they cost more than the others.

        In the first half of the warm-up none are named: they may only not have begun to learn.
        """
        found = {}
        if self.config.local_kl_start and not self.config.kl_warmup_steps:
            found["local_kl_start"] = (
                f"tokenizer.local_kl_start {self.config.local_kl_start:g} has no effect: it is the start of a warm-up, "
                "and tokenizer.kl_warmup_steps is 0"
            )
        if self._kl_weight < 0.5:
            return found
        local_waits = self.local_kl_weight(self._kl_weight) > 1
        for name, (nats, num_latents) in self.nats_by_group.items():
            is_local = name in self._local_groups
            if not nats.item() < COLLAPSED_NATS_PER_LATENT * num_latents or (is_local and local_waits):
                continue
            advice = "Raise tokenizer.kl_warmup_steps, or give fewer latents"
            if self.has_local_latents and not is_local:
                start = 2 * self.config.local_kl_start if self.config.local_kl_start > 1 else 4
                advice = (
                    "Raise tokenizer.kl_warmup_steps, and let the local latents wait: "
                    f"tokenizer.local_kl_start {start:g}"
                )
            found[f"collapse of {name}"] = (
                f"{name} collapsed: {nats.item():.3g} nats per image in {num_latents} latents, so they tell the "
                f"decoder next to nothing. {advice}"
            )
        return found

    def _train_pass(self, step: int | None, *inputs: Tensor) -> TokenizerOutput:
        """`objective` of images (and what else a subclass trains with), each row k times."""
        num_draws = self.config.num_draws
        trained = self.objective(*(rows.repeat_interleave(num_draws, dim=0) for rows in inputs), step=step)
        self._kl_weight = self.kl_weight(step)
        decay = self.config.weight_decay / 2 * torch.stack([w.square().sum() for w in self.decayed_weights()]).sum()
        output = TokenizerOutput(
            self.likelihood.mean(trained.decoded.params[::num_draws].detach()),
            tuple(code[::num_draws] for code in trained.codes),
            {**trained.losses, "weight_decay": decay},
        )
        local = {name: (group.kl.detach().mean(), group.num_dims) for name, group in trained.decoded.local.items()}
        self._local_groups = set(local)
        # Never compiled, since CUDA graphs write each step's results over those of the step before; last, so that the
        # graph is not broken in two. As a decorator it would import torch's compiler together with this package.
        torch.compiler.disable(self._remember)({**trained.nats, **local})
        return output

    def decayed_weights(self) -> list[nn.Parameter]:
        """What weight decay applies to."""
        return self.network.decayed_weights()

    @torch.no_grad()
    def _remember(self, of_batch: dict[str, tuple[Tensor, int]]) -> None:
        """Follows what each group of latents carries, for `complaints`."""
        for name, (nats, num_latents) in of_batch.items():
            nats = nats.detach().float()
            known = self.nats_by_group.get(name, (nats, num_latents))[0]
            known = torch.where(known.isfinite(), known, nats)
            moved = torch.lerp(known, nats, 0.02)  # not a number in a step that overflows
            self.nats_by_group[name] = (torch.where(moved.isfinite(), moved, known), num_latents)

    # Parts
    # --------------------------------------------------------------------------------------------

    def features(self, images: Tensor) -> Sequence[Tensor]:
        return self.network.features(images - self.mean_image)

    def decode_latents(
        self, latents: Tensor, features: Sequence[Tensor] | None = None, noise: Noise | None = torch.randn_like
    ) -> Decoded:
        """Parameters of p(x | z); for the bernoulli likelihood the mean image's logits are added to the decoder's."""
        decoded = self.network.decode(latents.to(self.mean_image.dtype), features, noise)
        if self.likelihood.num_values == 2:
            # Not by _replace, whose result torch.compile (2.11) cannot carry over a break of the graph
            mean_logits = self.mean_image.float().clamp(0.001, 0.999).logit()  # 0.999 is 1 in bfloat16
            decoded = Decoded(decoded.params + mean_logits.to(decoded.params.dtype), decoded.local)
        return decoded

    def check_encoded(self, *parameters: Tensor) -> None:
        """Raises ValueError where parameters of q(z | x), each (B, n), are not finite; not while training."""
        if not self.training:  # the loop looks at its gradients, and each look waits for the device
            check_finite(torch.cat(parameters, dim=1))

    def _reconstruct(self, images: Tensor) -> TokenizerOutput:
        features = self.features(images)
        codes, latents, _ = self.infer(features, self.network.infer(features, 0, []), sample=False)
        params = self.decode_latents(latents, features, noise=None).params
        return TokenizerOutput(self.likelihood.mean(params), codes, {})


def importance_weighted(log_weights: Tensor, num_draws: int) -> Tensor:
    """Minus the k-draw bound (Burda et al. 2016, arXiv:1509.00519), (B,) nats, of log weights (B k,)."""
    log_weights = log_weights.unflatten(0, (-1, num_draws))
    return math.log(num_draws) - log_weights.logsumexp(dim=1)


def balanced_kl(local: dict[str, LocalGroup], kl_weight: float) -> Tensor:
    """Weighted sum over the groups of local latents, of which there is one at least, (B,) nats, for training.

    While the KL term warms up, each group's weight is proportional to its mean KL per latent, and the weights sum to
    the number of groups: groups that are hardly used yet cost little. No gradient goes through the weights (Vahdat &
    Kautz 2020, arXiv:2007.03898, appendix A, with the proportionality that its first author corrected).
    """
    if kl_weight >= 1:
        return kl_weight * local_kl(local)
    per_latent = torch.stack([group.kl.detach().mean() / group.num_dims for group in local.values()])
    per_latent = mean_over_processes(per_latent) + 1e-4
    balance = per_latent * len(local) / per_latent.sum()
    return kl_weight * _total([weight * group.kl for weight, group in zip(balance, local.values())])


def local_kl(local: dict[str, LocalGroup]) -> Tensor | float:
    """Sum over the groups of local latents, (B,) nats."""
    return _total([group.kl for group in local.values()])


def local_rate(local: dict[str, LocalGroup], num_draws: int) -> Tensor | float:
    """What the local latents h cost in a log weight of the `num_draws`-draw bound, (B,) nats.

    One draw has the analytic KL, which varies less. Several need log q(h) - log p(h) at each draw, as `draw_posterior`
    has it (Burda et al. 2016, arXiv:1509.00519, Eq. 8): the log mean of p(x | h) exp(-KL) may exceed log p(x).
    """
    return local_kl(local) if num_draws == 1 else -_total([group.log_ratio for group in local.values()])


def _total(parts: list[Tensor]) -> Tensor | float:
    return torch.stack(parts).sum(dim=0) if parts else 0.0
