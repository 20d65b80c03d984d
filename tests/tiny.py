"""The smallest real configuration of every registered name; a law fails by name where one is missing."""

from prior import PRIORS as REGISTERED_PRIORS
from prior.base import CodeSpec
from prior.bits import BitPrior

# Small code spaces: one map, a non-square map, two levels, a binary vector, two levels of bits.
SPECS = {
    "map": CodeSpec(((2, 2),), (3,)),
    "wide": CodeSpec(((1, 3),), (4,)),
    "levels": CodeSpec(((1, 1), (1, 2)), (3, 2)),
    "bits": CodeSpec(((4,),), (2,)),
    "powers": CodeSpec(((1, 1), (1, 2)), (4, 2)),
}

# Code spaces of real numbers: a vector, two levels. Some priors take them and refuse others.
REAL_SPECS = {"vector": CodeSpec(((3,),), (None,)), "levels": CodeSpec(((2,), (1, 2)), (None, None))}
REAL_PRIORS = tuple(name for name, kind in REGISTERED_PRIORS.items() if kind.Config.takes_real)

# Priors over bits take unconditional codes whose vocabularies are powers of two, and refuse others.
BIT_PRIORS = tuple(name for name, kind in REGISTERED_PRIORS.items() if issubclass(kind, BitPrior))
# What makes the codes of a tokenizer such ones.
POWERS_OF_TWO: dict[str, dict] = {
    "gumbel_softmax": {"num_categories": 4},
    "vqvae": {"quantizer": {"type": "lfq", "num_bits": 3}},
    "vqvae2": {"codebook_sizes": (2, 4)},
}


def takes(prior: str, spec: CodeSpec, num_classes: int = 0) -> bool:
    """Whether a prior is made for these codes; it raises ValueError for others."""
    if prior in REAL_PRIORS or not spec.is_discrete:
        return prior in REAL_PRIORS and num_classes == 0 and set(spec.vocab_sizes) == {None}
    return prior not in BIT_PRIORS or (num_classes == 0 and all(k & (k - 1) == 0 for k in spec.vocab_sizes))


# Options of every registered prior, tokenizer and part, without the "type".
PRIORS: dict[str, dict] = {
    "uniform": {},
    "pixelcnn": {"hidden_dim": 8, "num_layers": 2, "kernel_size": 3},
    "pixelsnail": {
        "hidden_dim": 8,
        "num_blocks": 2,
        "num_residual_blocks": 1,
        "num_heads": 2,
        "attention_dim": 4,
        "dropout": 0.0,
    },
    "gpt": {"hidden_dim": 16, "num_layers": 2, "num_heads": 2, "dropout": 0.0},
    "bernoulli": {},
    "rbm": {"num_chains": 8, "burn_in": 20},
    "factorial": {},
    "gaussian_mixture": {"num_components": 2},
}

QUANTIZERS: dict[str, dict] = {
    "ema_vq": {"codebook_size": 5, "code_dim": 4},
    "fsq": {"levels": (8, 5)},
    "gumbel": {"codebook_size": 5, "code_dim": 4},
    "lfq": {"num_bits": 3},
    "residual": {"depth": 2, "codebook_size": 5, "code_dim": 4},
    "vq": {"codebook_size": 5, "code_dim": 4},
}

NETWORKS: dict[str, dict] = {
    "conv": {"hidden_dim": 8, "num_residual_blocks": 1, "residual_dim": 2},
    "resnet": {"hidden_dim": 4, "dim_multipliers": (1, 2), "num_residual_blocks": 1, "num_groups": 2},
}

SMOOTHINGS: dict[str, dict] = {
    "exponential": {"beta": 5.0},
    "gaussian": {"beta": 10.0},
    "power": {"beta": 10.0},
    "uniform_exponential": {"beta": 8.0},
}

LIKELIHOODS: dict[str, dict] = {
    "bernoulli": {},
    "categorical": {},
    "laplace": {},
    "logistic_mixture": {"num_components": 2},
    "normal": {},
}

_AUTOENCODER = {
    "image_shape": (3, 8, 8),
    "latent_dim": 4,
    "network": {"type": "conv", **NETWORKS["conv"]},
    "quantizer": {"type": "ema_vq", **QUANTIZERS["ema_vq"]},
}
LATENT_NETWORKS: dict[str, dict] = {
    "conv": {"hidden_dims": (8, 4), "local_dims": (2, 1), "global_dim": 8},
    "mlp": {"hidden_dim": 8, "num_layers": 1},
}

_BINARY = {
    "image_shape": (3, 8, 8),
    "num_groups": 2,
    "bits_per_group": 3,
    "network": {"type": "mlp", **LATENT_NETWORKS["mlp"]},
    "prior": {"type": "rbm", "num_chains": 8, "num_sweeps": 1, "burn_in": 5},
}
_GAUSSIAN = {"image_shape": (3, 8, 8), "latent_dim": 4, "network": {"type": "mlp", **LATENT_NETWORKS["mlp"]}}
TOKENIZERS: dict[str, dict] = {
    "concrete": {**_BINARY, "prior": {"type": "bernoulli"}},
    "cvae": {**_GAUSSIAN, "num_classes": 3},
    "dvae": _BINARY,
    "dvaepp": _BINARY,
    "dvaesharp": {**_BINARY, "smoothing": {"type": "power"}, "num_draws": 2},
    "gaussian_integral": _BINARY,
    "gaussian_vae": _GAUSSIAN,
    "gumbel_softmax": {
        "image_shape": (3, 8, 8),
        "num_groups": 2,
        "latents_per_group": 2,
        "num_categories": 3,
        "network": {"type": "mlp", **LATENT_NETWORKS["mlp"]},
    },
    "gumbolt": _BINARY,
    "nvil": _BINARY,
    "reinforce": _BINARY,
    "vimco": {**_BINARY, "num_draws": 2},
    "vqvae": {**_AUTOENCODER, "downsample_factor": 4},
    "vqvae2": {**_AUTOENCODER, "downsample_factors": (4, 2), "codebook_sizes": (3, 5)},
}
