"""Distributions over codes: they know integers, in one case real numbers, not images.

Letters: B batch, L levels, N codes per image, N_l codes of level l, K or K_l vocabulary size of a level, h w code map,
D hidden channels, T tokens. Codes are int64 and come as a tuple of one tensor (B, *shape) per level, coarse to fine.
Log-probabilities are in nats.

To add a prior, write one file, name its class in `PRIORS`, and its smallest configuration in tests/tiny.py.
"""

from prior.torchvision_guard import ensure_torchvision

ensure_torchvision()

from prior.base import CodeSpec, Prior, PriorConfig  # noqa: E402
from prior.bernoulli import Bernoulli  # noqa: E402
from prior.factorial import Factorial  # noqa: E402
from prior.gaussian_mixture import GaussianMixture  # noqa: E402
from prior.gpt import GPT  # noqa: E402
from prior.pixelcnn import PixelCNN  # noqa: E402
from prior.pixelsnail import PixelSNAIL  # noqa: E402
from prior.rbm import RBM  # noqa: E402
from prior.uniform import Uniform  # noqa: E402

PRIORS: dict[str, type[Prior]] = {
    "uniform": Uniform,
    "pixelcnn": PixelCNN,
    "pixelsnail": PixelSNAIL,
    "gpt": GPT,
    "bernoulli": Bernoulli,
    "rbm": RBM,
    "factorial": Factorial,
    "gaussian_mixture": GaussianMixture,
}

__all__ = ["PRIORS", "CodeSpec", "Prior", "PriorConfig"]
