"""Tokenizers: autoencoders p(x | codes), q(codes | x), with the prior they assume while training.

Letters in shapes: B batch, C image channels, H W image height and width, h w code map height and width, D channels of a
latent or a code vector, K codebook size, N vectors or codes, L levels (coarse to fine).
"""

import prior  # noqa: F401  first, for what it sets up before torchvision may be imported
from tokenizer.base import PosteriorDraw, Tokenizer, TokenizerConfig, TokenizerOutput
from tokenizer.vqvae import VQVAE, VQVAEConfig
from tokenizer.vqvae2 import VQVAE2, VQVAE2Config

TOKENIZERS: dict[str, type[Tokenizer]] = {
    "vqvae": VQVAE,
    "vqvae2": VQVAE2,
}

__all__ = [
    "TOKENIZERS",
    "VQVAE",
    "VQVAE2",
    "PosteriorDraw",
    "Tokenizer",
    "TokenizerConfig",
    "TokenizerOutput",
    "VQVAE2Config",
    "VQVAEConfig",
]
