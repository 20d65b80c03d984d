"""Smoothing families against quadrature, bisection, finite differences and the Kolmogorov-Smirnov test."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from tests import tiny
from tokenizer.registry import build
from tokenizer.smoothing import SMOOTHINGS, Exponential, Gaussian, Power, UniformExponential

BETAS = (0.5, 2.0, 5.0, 8.0, 12.0, 20.0, 35.0, 50.0)
FAMILIES = [
    *(Exponential(beta) for beta in (2.0, 8.0, 14.0)),
    UniformExponential(16.0),
    UniformExponential(30.0, 0.1),
    Gaussian(25.0),
    Gaussian(40.0),
    Power(20.0),
    Power(40.0),
]


def name(family) -> str:
    return f"{type(family).__name__}-{family.beta:g}"


@pytest.fixture(params=FAMILIES, ids=name)
def family(request):
    return request.param


# Densities of r(zeta | 0) written down independently of the code


def density(family, zeta):
    beta = family.beta
    if isinstance(family, Gaussian):
        return torch.exp(-beta * zeta**2 / 2) * math.sqrt(beta / (2 * math.pi))
    if isinstance(family, Power):
        return zeta ** (1 / beta - 1) / beta
    exponential = beta * torch.exp(-beta * zeta) / (1 - math.exp(-beta))
    if isinstance(family, UniformExponential):
        return (1 - family.epsilon) * exponential + family.epsilon
    return exponential


def cdf(family, zeta):
    beta = family.beta
    if isinstance(family, Gaussian):
        return torch.special.ndtr(zeta * math.sqrt(beta))
    if isinstance(family, Power):
        return zeta ** (1 / beta)
    exponential = (1 - torch.exp(-beta * zeta)) / (1 - math.exp(-beta))
    if isinstance(family, UniformExponential):
        return (1 - family.epsilon) * exponential + family.epsilon * zeta
    return exponential


def mixture_cdf(family, zeta, q):
    mirrored = cdf(family, zeta - 1) if isinstance(family, Gaussian) else 1 - cdf(family, 1 - zeta)
    return q * mirrored + (1 - q) * cdf(family, zeta)


# The exponential family's analytic quantile


@pytest.mark.parametrize("beta", BETAS)
def test_quantile_inverts_the_cumulative_distribution(beta):
    generator = torch.Generator().manual_seed(0)
    logits = (torch.rand(4000, generator=generator, dtype=torch.float64) * 24) - 12
    rho = torch.rand(4000, generator=generator, dtype=torch.float64)
    family = Exponential(beta)
    zeta = family.quantile(rho, logits)
    assert (mixture_cdf(family, zeta, logits.sigmoid()) - rho).abs().max() < 1e-12
    low, high = torch.zeros_like(rho), torch.ones_like(rho)
    for _ in range(60):
        middle = (low + high) / 2
        below = mixture_cdf(family, middle, logits.sigmoid()) < rho
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    assert (zeta - low).abs().max() < 1e-11


@pytest.mark.parametrize("beta", [5.0, 14.0, 40.0])
def test_quantile_holds_in_float32_where_the_textbook_root_does_not(beta):
    generator = torch.Generator().manual_seed(1)
    logits = torch.rand(20_000, generator=generator) * 30 - 15
    rho = torch.rand(20_000, generator=generator)
    family = Exponential(beta)
    exact = family.quantile(rho.double(), logits.double())
    ours = family.quantile(rho, logits)
    assert ours.isfinite().all()
    assert (ours - exact).abs().max() < 2e-3
    q, decay = logits.sigmoid(), math.exp(-beta)
    b = (rho + decay * (q - rho)) / (1 - q) - 1
    textbook = -torch.log((-b + (b * b + 4 * q * decay / (1 - q)).sqrt()) / 2) / beta
    failed = ~(textbook - exact).abs().lt(2e-3)
    assert failed.float().mean() > 0.02


@given(beta=st.floats(0.5, 50), logit=st.floats(-30, 30), rho=st.sampled_from([1e-7, 1e-3, 0.3, 0.5, 0.9, 1 - 1e-7]))
@settings(max_examples=100)
def test_quantile_is_symmetric_monotone_and_finite(beta, logit, rho):
    family = Exponential(beta)
    logit, rho = torch.tensor(logit, dtype=torch.float64), torch.tensor(rho, dtype=torch.float64)
    zeta = family.quantile(rho, logit)
    assert 0 <= zeta <= 1
    torch.testing.assert_close(family.quantile(1 - rho, -logit), 1 - zeta, atol=1e-6, rtol=0)
    assert family.quantile(rho, logit + 0.1) >= zeta - 1e-9
    assert family.quantile((rho * 1.01).clamp(max=1), logit) >= zeta - 1e-9
    assert family.quantile(rho.float(), logit.float()).isfinite()


def test_quantile_has_the_limits_of_a_certain_bit():
    family, rho = Exponential(8.0), torch.linspace(0.01, 0.99, 50, dtype=torch.float64)
    spread = -math.expm1(-8.0)
    never = family.quantile(rho, torch.full_like(rho, -60.0))
    always = family.quantile(rho, torch.full_like(rho, 60.0))
    torch.testing.assert_close(never, -torch.log1p(-rho * spread) / 8)
    torch.testing.assert_close(always, 1 + torch.log(rho * spread + math.exp(-8.0)) / 8)


# Every family


@pytest.mark.parametrize("kind", sorted(SMOOTHINGS))
def test_every_registered_family_has_a_tiny_configuration_and_relaxes(kind):
    if kind not in tiny.SMOOTHINGS:
        pytest.fail(f"no tiny configuration of smoothing '{kind}' in tests/tiny.py")
    logits = torch.zeros(4, 3, requires_grad=True)
    relaxed = build("smoothing", SMOOTHINGS, {"type": kind, **tiny.SMOOTHINGS[kind]}).relax(logits)
    (relaxed.zeta.sum() + relaxed.log_ratio.sum()).backward()
    assert relaxed.zeta.shape == relaxed.log_ratio.shape == (4, 3)
    assert (logits.grad > 0).all()
    with pytest.raises(ValueError, match="beta must be positive and finite, got 0"):
        SMOOTHINGS[kind](beta=0)


@pytest.mark.parametrize("logit", [-3.0, 0.0, 1.5])
def test_draws_follow_the_mixture(family, logit):
    torch.manual_seed(0)
    count = 40_000
    relaxed = family.relax(torch.full((count,), logit, dtype=torch.float64))
    q = torch.tensor(logit, dtype=torch.float64).sigmoid()
    if isinstance(family, Power):
        # In terms of zeta the draws near 1 round to it; logit(zeta) keeps both sides apart
        logit_zeta = relaxed.log_ratio / (1 - 1 / family.beta)

        def distribution(t):
            t = torch.as_tensor(t)
            near_zero = torch.exp(F.logsigmoid(t) / family.beta)
            near_one = 1 - torch.exp(F.logsigmoid(-t) / family.beta)
            return (q * near_one + (1 - q) * near_zero).numpy()

        draws = logit_zeta
    else:

        def distribution(zeta):
            return mixture_cdf(family, torch.as_tensor(zeta), q).numpy()

        draws = relaxed.zeta
    assert stats.kstest(draws.numpy(), distribution).statistic < 1.63 / math.sqrt(count)  # the 1 % critical value


def test_the_log_ratio_is_that_of_the_densities(family):
    torch.manual_seed(0)
    relaxed = family.relax(torch.zeros(500, dtype=torch.float64))
    zeta, ratio = relaxed
    safe = (zeta > 1e-9) & (zeta < 1 - 1e-9) if not isinstance(family, Gaussian) else torch.ones_like(zeta).bool()
    zeta, ratio = zeta[safe], ratio[safe]
    mirrored = density(family, zeta - 1) if isinstance(family, Gaussian) else density(family, 1 - zeta)
    torch.testing.assert_close(ratio, mirrored.log() - density(family, zeta).log(), rtol=1e-5, atol=1e-5)


def test_the_bit_given_zeta_has_the_mean_of_the_bit(family):
    """E over zeta of sigmoid(logit + log ratio) = q."""
    torch.manual_seed(0)
    logits = torch.tensor([-2.0, 0.5]).repeat(40_000, 1).double()
    nu = torch.sigmoid(logits + family.relax(logits).log_ratio)
    error = nu.std(dim=0) / math.sqrt(len(nu))
    assert ((nu.mean(dim=0) - logits[0].sigmoid()).abs() < 4.5 * error).all()


def test_the_gradient_moves_zeta_along_its_quantile(family):
    """Implicit differentiation against finite differences of the quantile found by bisection."""
    torch.manual_seed(0)
    logits = torch.linspace(-3, 3, 60, dtype=torch.float64, requires_grad=True)
    if isinstance(family, Power):
        t = family.relax(logits).log_ratio / (1 - 1 / family.beta)
        (slope,) = torch.autograd.grad(t.sum(), logits)

        def distribution(t, q):
            return q * (1 - torch.exp(F.logsigmoid(-t) / family.beta)) + (1 - q) * torch.exp(
                F.logsigmoid(t) / family.beta
            )

        draws, low, high = t.detach(), -1e4, 1e4
    else:
        zeta = family.relax(logits).zeta
        (slope,) = torch.autograd.grad(zeta.sum(), logits)

        def distribution(zeta, q):
            return mixture_cdf(family, zeta, q)

        draws, low, high = zeta.detach(), -10.0, 10.0
        if not isinstance(family, Gaussian):
            low, high = 0.0, 1.0
    rho = distribution(draws, logits.detach().sigmoid())

    def quantile(logits):
        below, above = torch.full_like(rho, low), torch.full_like(rho, high)
        for _ in range(100):
            middle = (below + above) / 2
            left = distribution(middle, logits.sigmoid()) < rho
            below, above = torch.where(left, middle, below), torch.where(left, above, middle)
        return (below + above) / 2

    step = 1e-5
    numeric = (quantile(logits.detach() + step) - quantile(logits.detach() - step)) / (2 * step)
    torch.testing.assert_close(slope, numeric, rtol=2e-3, atol=1e-6)


def test_the_mean_gradient_of_the_exponential_family_is_the_papers():
    torch.manual_seed(0)
    for beta in (5.0, 8.0):
        logits = torch.zeros(400_000, dtype=torch.float64, requires_grad=True)
        (slope,) = torch.autograd.grad(Exponential(beta).relax(logits).zeta.sum(), logits)
        mean_given_zero = 1 / beta - 1 / (math.exp(beta) - 1)
        expected = 0.25 * (1 - 2 * mean_given_zero)
        assert abs(slope.mean() - expected) < 4.5 * slope.std() / math.sqrt(len(slope))
        largest = (1 - math.exp(-beta / 2)) ** 2 * math.exp(beta / 2) / (4 * beta)
        assert slope.max() <= largest * (1 + 1e-9)
        assert slope.max() > 0.99 * largest


@pytest.mark.parametrize("kind", sorted(SMOOTHINGS))
@pytest.mark.parametrize("logit", [-40.0, -15.0, 0.0, 15.0, 40.0])
def test_float32_stays_finite_for_any_logit(kind, logit):
    torch.manual_seed(0)
    logits = torch.full((20_000,), logit, requires_grad=True)
    relaxed = SMOOTHINGS[kind]().relax(logits)
    (relaxed.zeta.sum() + 0.01 * relaxed.log_ratio.sum()).backward()
    assert relaxed.zeta.isfinite().all()
    assert relaxed.log_ratio.isfinite().all()
    assert logits.grad.isfinite().all()


def test_power_draws_are_symmetric_in_float32():
    """Rounding zeta itself would set 42 % of the draws near 1 to exactly 1 at beta = 20, and none near 0."""
    torch.manual_seed(0)
    ratio = Power(20.0).relax(torch.zeros(100_000)).log_ratio
    assert stats.kstest(ratio[ratio > 0].numpy(), (-ratio[ratio < 0]).numpy()).statistic < 0.01
