"""p(x | z): what the decoder's output means, as a training loss, as a probability of discrete pixels, and as an image.

Letters: V pixel values, M mixture components. Images are (B, C, H, W) in [0, 1]; a pixel value is k / (V - 1).
Locations that the decoder predicts are on the scale [-1, 1], on which networks work best.
"""

import math
from abc import ABC, abstractmethod

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn


class Likelihood(nn.Module, ABC):
    """A distribution of an image's pixels, given the decoder's output `params` (B, num_channels, H, W).

    Raises:
        ValueError: image_channels is neither 1 nor 3.
    """

    num_values = 256  # of a pixel; the probabilities of these sum to one
    num_channels: int

    def __init__(self, image_channels: int):
        super().__init__()
        if image_channels not in (1, 3):
            raise ValueError(f"image_channels must be 1 or 3, got {image_channels}")
        self.image_channels = image_channels

    @abstractmethod
    def losses(self, params: Tensor, images: Tensor) -> dict[str, Tensor]:
        """Training losses by name, weighted scalars."""

    @abstractmethod
    def nll(self, params: Tensor, images: Tensor) -> Tensor:
        """-log p(x | params) of the discrete pixels, summed over an image: (B,) nats."""

    @abstractmethod
    def mean(self, params: Tensor) -> Tensor:
        """The expected image, (B, C, H, W) in [0, 1]."""

    def initial_params(self, images: Tensor) -> Tensor | None:
        """What a decoder should give before it has learned, (num_channels,); None: whatever it gives at random."""
        return None


class _LocationScale(Likelihood):
    """A location per pixel from the decoder, and one scale learned for the whole data set.

    The reconstruction loss fixes the scale, as the papers do; the scale that best explains the pixels is fitted beside
    it by the loss "nll" with the location detached, so that it changes nothing in the reconstruction.
    """

    # For the fit of one number a fifth of the values is plenty, and the probabilities are dear. Five shares no factor
    # with a decoder's strides, which leave a pattern of powers of two in its errors.
    fitted_values = slice(None, None, 5)

    # Adam moves any parameter by about its learning rate per step. Ten times that lets the scale keep pace with the
    # reconstruction instead of lagging thousands of steps behind.
    scale_speed = 10.0

    def __init__(self, image_channels: int, scale: float):
        super().__init__(image_channels)
        self.num_channels = image_channels
        self.scale_parameter = nn.Parameter(torch.tensor(math.log(scale) / self.scale_speed))

    @property
    def log_scale(self) -> Tensor:
        """Natural logarithm of the scale, in units of [0, 1]; at least a tenth of a grey value of 256."""
        return (self.scale_speed * self.scale_parameter).clamp(min=math.log(0.1 / 255))

    @abstractmethod
    def log_cdf(self, x: Tensor) -> Tensor:
        """Logarithm of the cumulative distribution at location 0 and scale 1, symmetric about 0."""

    @abstractmethod
    def reconstruction_loss(self, location: Tensor, images: Tensor) -> Tensor:
        """Mean over pixels, location and images in units of [0, 1]."""

    def losses(self, params: Tensor, images: Tensor) -> dict[str, Tensor]:
        location = (params.float() + 1) / 2
        some_params, some_images = (x.detach().flatten(1)[:, self.fitted_values] for x in (params, images))
        return {
            "reconstruction": self.reconstruction_loss(location, images),
            "nll": self.nll(some_params, some_images).mean() / some_images.shape[1:].numel(),
        }

    def nll(self, params: Tensor, images: Tensor) -> Tensor:
        location = (params.float() + 1) / 2
        scale = self.log_scale.exp()
        values = _pixel_values(images, self.num_values)
        log_p = log_bin_mass(self.log_cdf, values, self.num_values, location, 1 / scale)
        return -log_p.flatten(1).sum(dim=1)

    def mean(self, params: Tensor) -> Tensor:
        return ((params.float() + 1) / 2).clamp(0, 1)


class Normal(_LocationScale):
    """Normal distribution: the mean squared error of VQ-VAE (van den Oord et al. 2017, arXiv:1711.00937).

    Its probability of a pixel value is the mass of the bin around it; the first and the last bin are open.

    Args:
        image_channels: 1 or 3.
        data_variance: of the training pixels in [0, 1], which the squared error is divided by as in the authors' code;
            0.06 is CIFAR-10's.
    Raises:
        ValueError: data_variance is not positive.
    """

    def __init__(self, image_channels: int, data_variance: float = 0.06):
        if not data_variance > 0:
            raise ValueError(f"data_variance must be greater than 0, got {data_variance}")
        super().__init__(image_channels, scale=math.sqrt(data_variance))
        self.data_variance = data_variance

    def reconstruction_loss(self, location: Tensor, images: Tensor) -> Tensor:
        return F.mse_loss(location, images) / self.data_variance

    def log_cdf(self, x: Tensor) -> Tensor:
        return torch.special.log_ndtr(x)


class Laplace(_LocationScale):
    """Laplace distribution: the mean absolute error of VQGAN (Esser et al. 2021, arXiv:2012.09841).

    Its probability of a pixel value is the mass of the bin around it; the first and the last bin are open.

    Args:
        image_channels: 1 or 3.
        data_deviation: mean absolute deviation of the training pixels in [0, 1], which the error is divided by; 0.2 is
            about CIFAR-10's. VQGAN divides by 1/2, since its images are in [-1, 1].
    Raises:
        ValueError: data_deviation is not positive.
    """

    def __init__(self, image_channels: int, data_deviation: float = 0.2):
        if not data_deviation > 0:
            raise ValueError(f"data_deviation must be greater than 0, got {data_deviation}")
        super().__init__(image_channels, scale=data_deviation)
        self.data_deviation = data_deviation

    def reconstruction_loss(self, location: Tensor, images: Tensor) -> Tensor:
        return F.l1_loss(location, images) / self.data_deviation

    def log_cdf(self, x: Tensor) -> Tensor:
        # Each branch only sees its own half: where() would pass on the overflow of the other one's gradient.
        below = x.clamp(max=0) - math.log(2)
        return torch.where(x < 0, below, torch.log1p(-torch.exp(-x.clamp(min=0)) / 2))


class Bernoulli(Likelihood):
    """Bernoulli distribution of binary pixels; `params` are logits.

    Args:
        image_channels: 1 or 3.
    """

    num_values = 2

    def __init__(self, image_channels: int):
        super().__init__(image_channels)
        self.num_channels = image_channels

    def losses(self, params: Tensor, images: Tensor) -> dict[str, Tensor]:
        return {"reconstruction": F.binary_cross_entropy_with_logits(params.float(), images)}

    def nll(self, params: Tensor, images: Tensor) -> Tensor:
        """As in the base class. Raises ValueError unless all pixels are 0 or 1.

        Compiled code does not look: on a GPU that would keep each training step waiting.
        """
        if not torch.compiler.is_compiling() and not ((images == 0) | (images == 1)).all():
            raise ValueError(
                "the bernoulli likelihood is a probability of binary images only, got values between 0 and 1; "
                "set data.binarize, or choose another likelihood"
            )
        nats = F.binary_cross_entropy_with_logits(params.float(), images, reduction="none")
        return nats.flatten(1).sum(dim=1)

    def mean(self, params: Tensor) -> Tensor:
        return params.float().sigmoid()

    def initial_params(self, images: Tensor) -> Tensor:
        """The logit of the mean pixel of each channel, as decoders of binary images have started since NADE.

        Without it the first steps teach nothing but that most pixels are black, and they teach the encoder too, whose
        codes all become the same.
        """
        return images.mean(dim=(0, 2, 3)).clamp(0.01, 0.99).logit()


class Categorical(Likelihood):
    """A probability of its own for each value of a pixel (van den Oord et al. 2016, arXiv:1601.06759, section 3.3).

    It assumes nothing of what values are near each other, so it fits any distribution and learns more slowly. Channels
    are independent given the codes. `params` are logits, those of a channel's V values side by side.

    Args:
        image_channels: 1 or 3.
    """

    def __init__(self, image_channels: int):
        super().__init__(image_channels)
        self.num_channels = image_channels * self.num_values

    def losses(self, params: Tensor, images: Tensor) -> dict[str, Tensor]:
        return {"reconstruction": self.nll(params, images).mean() / images.shape[1:].numel()}

    def nll(self, params: Tensor, images: Tensor) -> Tensor:
        values = _pixel_values(images, self.num_values).long()
        return F.cross_entropy(self._logits(params), values, reduction="none").flatten(1).sum(dim=1)

    def mean(self, params: Tensor) -> Tensor:
        values = torch.linspace(0, 1, self.num_values, device=params.device)
        return torch.einsum("bvchw,v->bchw", self._logits(params).softmax(dim=1), values).clamp(0, 1)

    def _logits(self, params: Tensor) -> Tensor:
        """(B, V, C, H, W) in float32."""
        return rearrange(params.float(), "b (c v) h w -> b v c h w", v=self.num_values)


class LogisticMixture(Likelihood):
    """Discretised mixture of logistics (Salimans et al. 2017, PixelCNN++, arXiv:1701.05517, section 2.1 and 2.2).

    One mixture per pixel. Given the component, each channel is a logistic distribution whose location depends linearly
    on the channels before it; the first and the last bin are open. `params` hold, for each component, a logit, and per
    channel a location and a log scale, then the coefficients of the channels before.

    Args:
        image_channels: 1 or 3.
        num_components: M; 10 is the paper's.
    Raises:
        ValueError: num_components is below 1.
    """

    min_log_scale = -7.0  # as in the authors' code: a tenth of a grey value, on the scale [-1, 1]

    def __init__(self, image_channels: int, num_components: int = 10):
        super().__init__(image_channels)
        if num_components < 1:
            raise ValueError(f"num_components must be at least 1, got {num_components}")
        self.num_components = num_components
        self.num_channels = num_components * (1 + 2 * image_channels + image_channels * (image_channels - 1) // 2)

    def losses(self, params: Tensor, images: Tensor) -> dict[str, Tensor]:
        return {"reconstruction": self.nll(params, images).mean() / images.shape[1:].numel()}

    def nll(self, params: Tensor, images: Tensor) -> Tensor:
        logits, locations, log_scales, coefficients = self._split(params)
        values = _pixel_values(images, self.num_values)
        x = (2 * values / (self.num_values - 1) - 1).unsqueeze(1)  # (B, 1, C, H, W) in [-1, 1]
        log_p = logits.log_softmax(dim=1)
        for channel in range(self.image_channels):
            location = locations[:, :, channel]
            for before in range(channel):
                location = location + coefficients[channel, before] * x[:, :, before]
            # From the scale [-1, 1] to that of log_bin_mass, [0, 1]: a logistic's scale halves.
            log_p = log_p + log_bin_mass(
                F.logsigmoid,
                values[:, None, channel],
                self.num_values,
                (location + 1) / 2,
                2 * torch.exp(-log_scales[:, :, channel]),
            )
        return -log_p.logsumexp(dim=1).flatten(1).sum(dim=1)

    def mean(self, params: Tensor) -> Tensor:
        """The expectation of the mixture before it is discretised, clamped to [0, 1]; no sampling."""
        logits, locations, _, coefficients = self._split(params)
        means: list[Tensor] = []  # per channel, (B, M, H, W)
        for channel in range(self.image_channels):
            mean = locations[:, :, channel]
            for before in range(channel):
                mean = mean + coefficients[channel, before] * means[before]
            means.append(mean.clamp(-1, 1))
        expected = (torch.stack(means, dim=2) * logits.softmax(dim=1).unsqueeze(2)).sum(dim=1)
        return ((expected + 1) / 2).clamp(0, 1)

    def _split(self, params: Tensor) -> tuple[Tensor, Tensor, Tensor, dict[tuple[int, int], Tensor]]:
        """Logits (B, M, H, W), locations and log scales (B, M, C, H, W), {(channel, before): (B, M, H, W)}."""
        channels = self.image_channels
        params = rearrange(params.float(), "b (m p) h w -> b m p h w", m=self.num_components)
        logits, locations, log_scales, coefficients = params.split(
            [1, channels, channels, channels * (channels - 1) // 2], dim=2
        )
        pairs = [(channel, before) for channel in range(channels) for before in range(channel)]
        coefficients = dict(zip(pairs, coefficients.tanh().unbind(dim=2)))
        return logits.squeeze(2), locations, log_scales.clamp(min=self.min_log_scale), coefficients


LIKELIHOODS: dict[str, type[Likelihood]] = {
    "bernoulli": Bernoulli,
    "categorical": Categorical,
    "laplace": Laplace,
    "logistic_mixture": LogisticMixture,
    "normal": Normal,
}


def _pixel_values(images: Tensor, num_values: int) -> Tensor:
    """Images in [0, 1] to whole numbers k in [0, V), as floats."""
    return (images.float() * (num_values - 1)).round()


def log_bin_mass(log_cdf, values: Tensor, num_values: int, location: Tensor, inverse_scale: Tensor) -> Tensor:
    """Log probability of the bin [k - 1/2, k + 1/2] / (V - 1); the first bin reaches to -inf, the last to inf.

    Args:
        log_cdf: logarithm of a symmetric cumulative distribution at location 0 and scale 1.
        values: k, whole numbers as floats; it broadcasts against the other two.
        num_values: V.
        location: in units of [0, 1].
        inverse_scale: one over the scale, in units of [0, 1].
    """
    upper = ((values + 0.5) / (num_values - 1) - location) * inverse_scale
    lower = ((values - 0.5) / (num_values - 1) - location) * inverse_scale
    # log(cdf(u) - cdf(l)) = log cdf(u) + log(1 - exp(log cdf(l) - log cdf(u))). Mirrored to the lower tail, where
    # log cdf is exact; in the upper tail it would be the logarithm of a difference of ones. An open bin has no second
    # term, and the last one is the mirrored first. log cdf is the dear part: twice is enough, in one call.
    first, last = values == 0, values == num_values - 1
    mirrored = last | (~first & (upper + lower > 0))
    bounds = torch.where(mirrored, -lower, upper), torch.where(mirrored, -upper, lower)
    high, low = log_cdf(torch.stack(bounds))
    inside = torch.log(-torch.expm1((low - high).clamp(max=-1e-10)))
    return high + torch.where(first | last, 0.0, inside)
