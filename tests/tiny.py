"""The smallest real configuration of every registered name; a law fails by name where one is missing."""

from prior.base import CodeSpec

# Small code spaces: one map, a non-square map, two levels, a binary vector.
SPECS = {
    "map": CodeSpec(((2, 2),), (3,)),
    "wide": CodeSpec(((1, 3),), (4,)),
    "levels": CodeSpec(((1, 1), (1, 2)), (3, 2)),
    "bits": CodeSpec(((4,),), (2,)),
}

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

LIKELIHOODS: dict[str, dict] = {
    "bernoulli": {},
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
TOKENIZERS: dict[str, dict] = {
    "vqvae": {**_AUTOENCODER, "downsample_factor": 4},
    "vqvae2": {**_AUTOENCODER, "downsample_factors": (4, 2), "codebook_sizes": (3, 5)},
}
