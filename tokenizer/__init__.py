"""Tokenizers: autoencoders p(x | codes), q(codes | x), with the prior they assume while training.

Letters in shapes: B batch, C image channels, H W image height and width, h w code map height and width, D channels of a
latent or a code vector, K codebook size, N vectors or codes, L levels (coarse to fine).
"""

import prior  # noqa: F401  first, for what it sets up before torchvision may be imported
from tokenizer.base import PosteriorDraw, Tokenizer, TokenizerConfig, TokenizerOutput
from tokenizer.concrete import Concrete
from tokenizer.cvae import CVAE
from tokenizer.dvae import DVAE
from tokenizer.dvaepp import DVAEPP
from tokenizer.dvaesharp import DVAESharp
from tokenizer.gaussian_integral import GaussianIntegral
from tokenizer.gaussian_vae import GaussianVAE
from tokenizer.gumbel_softmax import GumbelSoftmax
from tokenizer.gumbolt import GumBolt
from tokenizer.score_function import NVIL, REINFORCE, VIMCO
from tokenizer.vqvae import VQVAE, VQVAEConfig
from tokenizer.vqvae2 import VQVAE2, VQVAE2Config

TOKENIZERS: dict[str, type[Tokenizer]] = {
    "concrete": Concrete,
    "cvae": CVAE,
    "dvae": DVAE,
    "dvaepp": DVAEPP,
    "dvaesharp": DVAESharp,
    "gaussian_integral": GaussianIntegral,
    "gaussian_vae": GaussianVAE,
    "gumbel_softmax": GumbelSoftmax,
    "gumbolt": GumBolt,
    "nvil": NVIL,
    "reinforce": REINFORCE,
    "vimco": VIMCO,
    "vqvae": VQVAE,
    "vqvae2": VQVAE2,
}

__all__ = [
    "CVAE",
    "DVAE",
    "DVAEPP",
    "NVIL",
    "REINFORCE",
    "TOKENIZERS",
    "VIMCO",
    "VQVAE",
    "VQVAE2",
    "Concrete",
    "DVAESharp",
    "GaussianIntegral",
    "GaussianVAE",
    "GumBolt",
    "GumbelSoftmax",
    "PosteriorDraw",
    "Tokenizer",
    "TokenizerConfig",
    "TokenizerOutput",
    "VQVAE2Config",
    "VQVAEConfig",
]
