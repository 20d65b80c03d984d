"""Laws of every likelihood: its probabilities sum to one, and agree with independent formulas."""

import itertools
import math

import numpy as np
import pytest
import torch
from torch import Tensor

from tests import tiny
from tokenizer.likelihoods import LIKELIHOODS, Bernoulli, Categorical, Laplace, LogisticMixture, Normal
from tokenizer.registry import build


@pytest.fixture(params=sorted(LIKELIHOODS))
def name(request):
    if request.param not in tiny.LIKELIHOODS:
        pytest.fail(f"no tiny configuration of likelihood '{request.param}' in tests/tiny.py")
    return request.param


def make(name: str, image_channels: int):
    return build("likelihood", LIKELIHOODS, {"type": name, **tiny.LIKELIHOODS[name]}, image_channels=image_channels)


def random_images(likelihood, batch: int = 2, height: int = 2, width: int = 3) -> Tensor:
    shape = (batch, likelihood.image_channels, height, width)
    return torch.randint(likelihood.num_values, shape) / (likelihood.num_values - 1)


def all_pixels(likelihood) -> Tensor:
    """Every value of one pixel, (V^C, C, 1, 1)."""
    values = itertools.product(range(likelihood.num_values), repeat=likelihood.image_channels)
    return torch.tensor(list(values))[:, :, None, None] / (likelihood.num_values - 1)


@pytest.mark.parametrize("spread", [0.1, 1.0, 5.0])
def test_probabilities_of_all_values_of_a_pixel_sum_to_one(name, spread):
    likelihood = make(name, image_channels=1)
    params = spread * torch.randn(20, likelihood.num_channels, 1, 1)
    pixels = all_pixels(likelihood)
    log_p = torch.stack([-likelihood.nll(params, pixel.expand(20, 1, 1, 1)) for pixel in pixels])
    torch.testing.assert_close(log_p.exp().sum(dim=0), torch.ones(20), rtol=1e-4, atol=0)


def test_probabilities_of_all_coloured_pixels_sum_to_one(name, monkeypatch):
    if LIKELIHOODS[name].num_values > 6:
        monkeypatch.setattr(LIKELIHOODS[name], "num_values", 6)
    likelihood = make(name, image_channels=3)
    params = torch.randn(1, likelihood.num_channels, 1, 1)
    pixels = all_pixels(likelihood)
    log_p = -likelihood.nll(params.expand(len(pixels), -1, 1, 1), pixels)
    assert log_p.exp().sum().item() == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("channels", [1, 3])
def test_nll_is_per_image_and_mean_is_an_image(name, channels):
    likelihood = make(name, channels)
    params, images = 3 * torch.randn(2, likelihood.num_channels, 2, 3), random_images(likelihood)
    mean = likelihood.mean(params)
    assert likelihood.nll(params, images).shape == (2,)
    assert mean.shape == images.shape
    assert 0 <= mean.min() <= mean.max() <= 1


@pytest.mark.parametrize("channels", [1, 3])
def test_nll_of_an_image_does_not_depend_on_the_batch(name, channels):
    likelihood = make(name, channels)
    params, images = torch.randn(2, likelihood.num_channels, 2, 3), random_images(likelihood)
    alone = likelihood.nll(params[1:], images[1:])
    torch.testing.assert_close(likelihood.nll(params, images)[1:], alone, rtol=1e-6, atol=0)


@pytest.mark.parametrize("location", [-3.0, -0.9, 0.2])
@pytest.mark.parametrize("likelihood", [Normal(1, data_variance=0.001), Laplace(1, data_deviation=0.02)])
def test_the_negative_has_the_probability_of_the_image_even_in_the_tails(likelihood, location):
    pixels = all_pixels(likelihood)
    params = torch.full_like(pixels, location)
    torch.testing.assert_close(likelihood.nll(params, pixels), likelihood.nll(-params, 1 - pixels), rtol=1e-3, atol=0)
    assert likelihood.nll(params, pixels).diff().max() < 1e3  # nowhere does a probability vanish in rounding


@pytest.mark.parametrize("value", [-1e3, -30.0, 0.0, 30.0, 1e3])
def test_losses_and_gradients_are_finite_at_extreme_parameters(name, value):
    likelihood = make(name, image_channels=3)
    params = torch.full((2, likelihood.num_channels, 2, 3), value, requires_grad=True)
    for images in (torch.zeros(2, 3, 2, 3), torch.ones(2, 3, 2, 3), random_images(likelihood)):
        losses = likelihood.losses(params, images)
        sum(losses.values(), likelihood.nll(params, images).sum()).backward()
        assert all(loss.isfinite() for loss in losses.values())
        assert params.grad.isfinite().all()
    assert all(p.grad.isfinite().all() for p in likelihood.parameters())


def test_losses_are_in_float32_whatever_the_decoder(name):
    likelihood = make(name, image_channels=1)
    params = torch.randn(2, likelihood.num_channels, 2, 3).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = likelihood.losses(params, random_images(likelihood))
        nll = likelihood.nll(params, random_images(likelihood))
    assert all(value.dtype == torch.float32 for value in [*losses.values(), nll, likelihood.mean(params)])


def test_nll_rewards_the_right_image(name):
    likelihood = make(name, image_channels=1)
    params = torch.zeros(1, likelihood.num_channels, 8, 8, requires_grad=True)
    images = (torch.rand(1, 1, 8, 8) > 0.5).float()
    optimizer = torch.optim.Adam([params, *likelihood.parameters()], lr=0.1)
    for _ in range(100):
        optimizer.zero_grad()
        sum(likelihood.losses(params, images).values()).backward()
        optimizer.step()
    assert (likelihood.mean(params) - images).abs().max() < 0.15
    assert likelihood.nll(params, images) < likelihood.nll(torch.zeros_like(params), images)


# Independent formulas


def normal_cdf(x: float) -> float:
    return math.erfc(-x / math.sqrt(2)) / 2


def laplace_cdf(x: float) -> float:
    return math.exp(x) / 2 if x < 0 else 1 - math.exp(-x) / 2


def logistic_cdf(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def bin_mass(cdf, value: int, location: float, scale: float) -> float:
    """Mass of the bin of `value`, in float64; location and scale in units of [0, 1]."""
    upper = 1.0 if value == 255 else cdf(((value + 0.5) / 255 - location) / scale)
    lower = 0.0 if value == 0 else cdf(((value - 0.5) / 255 - location) / scale)
    return upper - lower


@pytest.mark.parametrize(("likelihood", "cdf"), [(Normal(1), normal_cdf), (Laplace(1), laplace_cdf)])
@pytest.mark.parametrize("value", [0, 1, 100, 128, 254, 255])
def test_location_scale_nll_is_the_mass_of_the_bin(likelihood, cdf, value):
    params = torch.tensor(-0.1).view(1, 1, 1, 1)
    nll = likelihood.nll(params, torch.full((1, 1, 1, 1), value / 255)).item()
    scale = likelihood.log_scale.exp().item()
    assert nll == pytest.approx(-math.log(bin_mass(cdf, value, 0.45, scale)), rel=1e-4)


def test_normal_loss_is_the_mean_squared_error_over_the_variance():
    likelihood = Normal(3, data_variance=0.5)
    params, images = torch.randn(2, 3, 4, 4), torch.rand(2, 3, 4, 4)
    expected = (((params.numpy() + 1) / 2 - images.numpy()) ** 2).mean() / 0.5
    assert likelihood.losses(params, images)["reconstruction"].item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("likelihood", [Normal(1), Laplace(1)])
def test_fitting_the_scale_leaves_the_reconstruction_alone(likelihood):
    params, images = torch.zeros(2, 1, 8, 8, requires_grad=True), random_images(likelihood, height=8, width=8)
    losses = likelihood.losses(params, images)
    assert torch.autograd.grad(losses["nll"], params, retain_graph=True, allow_unused=True) == (None,)
    (gradient,) = torch.autograd.grad(losses["nll"], likelihood.scale_parameter)
    assert gradient != 0


def test_learned_scale_becomes_the_standard_error():
    likelihood = Normal(1)
    params = torch.zeros(16, 1, 16, 16)
    images = (0.5 + 0.03 * torch.randn(16, 1, 16, 16)).clamp(0, 1)
    optimizer = torch.optim.Adam(likelihood.parameters(), lr=0.01)
    for _ in range(100):
        optimizer.zero_grad()
        likelihood.losses(params, images)["nll"].backward()
        optimizer.step()
    assert likelihood.log_scale.exp().item() == pytest.approx(0.03, rel=0.05)


def test_bernoulli_nll_is_the_log_probability_of_the_pixel():
    params = torch.tensor([[2.0, -1.0]]).view(1, 1, 1, 2)
    images = torch.tensor([[1.0, 1.0]]).view(1, 1, 1, 2)
    expected = -math.log(logistic_cdf(2.0)) - math.log(logistic_cdf(-1.0))
    assert Bernoulli(1).nll(params, images).item() == pytest.approx(expected, rel=1e-6)


def test_logistic_mixture_nll_agrees_with_a_sum_over_components_and_channels():
    likelihood = LogisticMixture(3, num_components=2)
    params, pixel = 0.5 * torch.randn(1, 20, 1, 1), [0, 100, 255]
    images = (torch.tensor(pixel) / 255).view(1, 3, 1, 1)
    table = params.double().view(2, 10).numpy()
    logits, locations, log_scales, c = table[:, 0], table[:, 1:4], table[:, 4:7], np.tanh(table[:, 7:])
    x = [2 * value / 255 - 1 for value in pixel]
    total = 0.0
    for m in range(2):
        means = [
            locations[m, 0],
            locations[m, 1] + c[m, 0] * x[0],
            locations[m, 2] + c[m, 1] * x[0] + c[m, 2] * x[1],
        ]
        mass = [
            bin_mass(logistic_cdf, value, (mean + 1) / 2, math.exp(scale) / 2)
            for value, mean, scale in zip(pixel, means, log_scales[m])
        ]
        total += np.exp(logits[m]) / np.exp(logits).sum() * np.prod(mass)
    assert likelihood.nll(params, images).item() == pytest.approx(-math.log(total), rel=1e-4)


def test_logistic_mixture_mean_is_the_expectation_over_all_pixels(monkeypatch):
    monkeypatch.setattr(LogisticMixture, "num_values", 16)
    likelihood = LogisticMixture(3, num_components=2)
    params = 0.3 * torch.randn(1, 2, 10, 1, 1)
    params[:, :, 7:] += torch.tensor([0.5, 1.0, -1.0])[:, None, None]
    params[:, :, 4:7] -= 2.5  # narrow: the open bins at the ends, which the closed form ignores, hold little mass
    params = params.flatten(1, 2)
    pixels = all_pixels(likelihood)
    p = (-likelihood.nll(params.expand(len(pixels), -1, 1, 1), pixels)).exp()
    expected = (p[:, None] * pixels.flatten(1)).sum(dim=0)
    torch.testing.assert_close(likelihood.mean(params).flatten(), expected, rtol=0, atol=0.01)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:The .grad attribute")  # of torch's own compiler
def test_nll_is_one_graph_for_torch_compile(name):
    likelihood = make(name, image_channels=3)
    params, images = torch.randn(2, likelihood.num_channels, 2, 3), random_images(likelihood)
    torch._dynamo.reset()
    compiled = torch.compile(likelihood.nll, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(params, images), likelihood.nll(params, images))


# Errors


def test_bernoulli_nll_refuses_images_that_are_not_binary():
    with pytest.raises(ValueError, match=r"binary images only.*data\.binarize"):
        Bernoulli(1).nll(torch.zeros(1, 1, 2, 2), torch.full((1, 1, 2, 2), 0.5))


@pytest.mark.parametrize(
    ("make_bad", "message"),
    [
        (lambda: Normal(2), "image_channels must be 1 or 3, got 2"),
        (lambda: Normal(1, data_variance=0.0), "data_variance must be greater than 0, got 0.0"),
        (lambda: Laplace(1, data_deviation=-1.0), "data_deviation must be greater than 0, got -1.0"),
        (lambda: LogisticMixture(1, num_components=0), "num_components must be at least 1, got 0"),
    ],
)
def test_options_out_of_range_are_refused(make_bad, message):
    with pytest.raises(ValueError, match=message):
        make_bad()


def test_categorical_logits_of_a_channel_stand_side_by_side():
    params = torch.randn(2, 3 * 256, 1, 2)
    probabilities = params.double().unflatten(1, (3, 256)).softmax(dim=2)  # (B, C, V, H, W)
    values = torch.randint(256, (2, 3, 1, 2))
    nats = -probabilities.gather(2, values[:, :, None]).log().sum(dim=(1, 2, 3, 4))
    torch.testing.assert_close(Categorical(3).nll(params, values / 255).double(), nats, rtol=1e-5, atol=0)
    means = (probabilities * torch.arange(256)[:, None, None] / 255).sum(dim=2)
    torch.testing.assert_close(Categorical(3).mean(params).double(), means, rtol=1e-5, atol=0)
