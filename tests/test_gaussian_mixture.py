"""Real-valued codes and their prior, against quadrature, torch.distributions and conditional densities."""

import math

import numpy as np
import pytest
import torch
from scipy import stats
from torch import distributions

from pipelines.code_writing import write_codes
from pipelines.metrics import CodeCounts
from prior import PRIORS, CodeSpec
from prior.gaussian_mixture import GaussianMixture, GaussianMixtureConfig
from tests import tiny

VECTOR, LEVELS = tiny.REAL_SPECS["vector"], tiny.REAL_SPECS["levels"]
NUM_SAMPLES = 4000
SMALLEST_P_VALUE = 1e-3  # seeds are fixed: a test passes always or never


def make(spec=VECTOR, num_components=3, num_classes=0) -> GaussianMixture:
    """Components that overlap and differ in weight, place and width."""
    prior = GaussianMixture(GaussianMixtureConfig(spec=spec, num_components=num_components, num_classes=num_classes))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter, scale in zip(prior.parameters(), (1.0, 1.5, 0.4)):
            parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))
    return prior.eval()


def real(*sizes: int) -> CodeSpec:
    return CodeSpec(tuple((size,) for size in sizes), (None,) * len(sizes))


def seed(number: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(number)


def reference(prior: GaussianMixture, temperature: float = 1.0) -> distributions.MixtureSameFamily:
    """The mixture of torch.distributions, over all numbers side by side, as sampling at a temperature changes it."""
    means, log_stds = (table.expand(-1, sum(prior.lengths)) for table in (prior.means, prior.log_stds))
    normal = distributions.Normal(means, temperature * log_stds.exp())
    weights = distributions.Categorical(logits=prior.logits / temperature)
    return distributions.MixtureSameFamily(weights, distributions.Independent(normal, 1))


def assert_distributed(samples: torch.Tensor, cdf) -> None:
    assert stats.kstest(samples.double().numpy(), cdf).pvalue > SMALLEST_P_VALUE


# --- density --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_components", [1, 3])
def test_the_density_integrates_to_one(num_components):
    x = torch.linspace(-12, 12, 601)
    prior, plane = make(real(1), num_components), make(real(1, 1), num_components)
    assert (prior.log_prob((x[:, None],)).double().exp().sum() * 0.04).item() == pytest.approx(1, abs=1e-5)
    grid = tuple(level.reshape(-1, 1) for level in torch.meshgrid(x, x, indexing="ij"))
    assert (plane.log_prob(grid).double().exp().sum() * 0.04**2).item() == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("num_components", [1, 3])
@pytest.mark.parametrize("spec", [VECTOR, LEVELS], ids=["vector", "levels"])
def test_the_density_is_that_of_torch_distributions(spec, num_components):
    prior = make(spec, num_components)
    codes = spec.unflatten(2 * torch.randn(20, spec.length, generator=seed()))
    expected = reference(prior).log_prob(spec.flatten(codes))
    torch.testing.assert_close(prior.log_prob(codes), expected, rtol=1e-5, atol=1e-5)


def test_one_component_is_the_standard_normal_and_learns_nothing():
    prior = make(LEVELS, num_components=1)
    assert not list(prior.parameters())
    assert not prior.state_dict()
    z = torch.randn(5, 4, generator=seed())
    torch.testing.assert_close(
        prior.log_prob(LEVELS.unflatten(z)), -z.square().sum(1) / 2 - 2 * math.log(2 * math.pi), rtol=1e-6, atol=1e-5
    )


def test_one_component_takes_no_memory_whatever_the_size_of_the_codes():
    prior = GaussianMixture(GaussianMixtureConfig(spec=CodeSpec(((2**24, 2**20),), (None,))))
    assert sum(buffer.numel() for buffer in prior.to(torch.bfloat16).buffers()) == 3
    half = make(LEVELS, num_components=1).to(torch.bfloat16)
    codes = half.sample(5, generator=seed())
    assert all(torch.equal(a, b) for a, b in zip(codes, make(LEVELS, num_components=1).sample(5, generator=seed())))
    torch.testing.assert_close(half.log_prob(codes), reference(half.float()).log_prob(LEVELS.flatten(codes)))


def test_the_density_needs_float32_also_under_autocast():
    prior, codes = make(), (torch.randn(5, 3, generator=seed()),)
    expected = prior.log_prob(codes)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(prior.log_prob(codes), expected)


def test_a_mixture_learns_the_density_of_what_it_sees():
    spec = real(2)
    z = torch.cat([0.3 * torch.randn(600, 2, generator=seed()) + 2, torch.randn(200, 2, generator=seed(1)) - 2])
    prior = GaussianMixture(GaussianMixtureConfig(spec=spec, num_components=2)).train()
    optimizer = torch.optim.Adam(prior.parameters(), lr=0.05)
    for _ in range(150):
        optimizer.zero_grad()
        prior((z,))["nll"].backward()
        optimizer.step()
    assert all(parameter.grad.any() for parameter in prior.parameters())
    first, second = prior.means.detach()[prior.means[:, 0].argsort(descending=True)]
    torch.testing.assert_close(first, torch.full((2,), 2.0), rtol=0, atol=0.1)
    torch.testing.assert_close(second, torch.full((2,), -2.0), rtol=0, atol=0.25)
    assert prior.logits.softmax(0).max().item() == pytest.approx(0.75, abs=0.02)
    assert prior.log_stds.exp().min().item() == pytest.approx(0.3, abs=0.03)


# --- sampling -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("num_components", [1, 3])
def test_samples_have_the_density_that_the_temperature_makes(num_components, temperature):
    """Along lines in all directions, on which a mixture of normal distributions is one of one dimension."""
    prior = make(LEVELS, num_components)
    codes = prior.sample(NUM_SAMPLES, temperature=temperature, generator=seed())
    LEVELS.check(codes)
    z, weights = LEVELS.flatten(codes), (prior.logits / temperature).softmax(0).detach().double().numpy()
    for direction in [*torch.eye(4), *torch.randn(4, 4, generator=seed(1))]:
        means = (prior.means.expand(-1, 4) @ direction).detach().double().numpy()
        stds = (temperature * (prior.log_stds.exp() * direction).norm(dim=1)).detach().double().numpy()
        assert_distributed(z @ direction, lambda x, m=means, s=stds: stats.norm.cdf(x[:, None], m, s) @ weights)


def test_temperature_zero_takes_the_mean_of_the_most_probable_component():
    prior = make()
    (z,) = prior.sample(3, temperature=0, generator=seed())
    torch.testing.assert_close(z, prior.means[prior.logits.argmax()].expand(3, -1), rtol=0, atol=0)


def test_numbers_are_drawn_given_those_that_are_known():
    prior, known = make(real(2)), torch.tensor([[True, False]]).expand(NUM_SAMPLES, 2)
    fixed = torch.full((NUM_SAMPLES, 2), 0.7)
    (z,) = prior.sample(NUM_SAMPLES, given=((fixed,), (known,)), generator=seed())
    assert torch.equal(z[:, 0], fixed[:, 0])
    far = torch.where(known, fixed, 1e30)  # what stands at the unknown places does not matter
    assert torch.equal(prior.sample(NUM_SAMPLES, given=((far,), (known,)), generator=seed())[0], z)
    x = torch.linspace(-12, 12, 4001)
    density = prior.log_prob((torch.stack([torch.full_like(x, 0.7), x], dim=1),)).double().exp().detach().numpy()
    cumulative = density.cumsum() / density.sum()
    assert_distributed(z[:, 1], lambda values: np.interp(values, x.numpy(), cumulative))
    (free,) = prior.sample(NUM_SAMPLES, generator=seed())
    assert stats.ks_2samp(z[:, 1].numpy(), free[:, 1].numpy()).pvalue < SMALLEST_P_VALUE  # what is known matters


def test_an_image_depends_on_its_own_generator_alone():
    prior, before = make(LEVELS), torch.get_rng_state()
    together = prior.sample(4, generator=[seed(i) for i in range(4)])
    for i in range(4):
        alone = prior.sample(1, generator=[seed(i)])
        assert all(torch.equal(a[0], t[i]) for a, t in zip(alone, together))
    assert not torch.equal(together[0][0], together[0][1])
    assert torch.get_rng_state().equal(before)


def test_progress_is_told_and_no_gradient_is_left():
    calls = []
    codes = make(LEVELS).train().sample(2, callback=lambda done, total: calls.append((done, total)))
    assert calls == [(4, 4)]
    assert not codes[0].requires_grad


# --- classes --------------------------------------------------------------------------------------------------------

CLASSES = CodeSpec(((1,), (2,)), (3, None))


def test_the_class_is_a_code_that_only_its_own_label_knows():
    prior, z = make(CLASSES, num_classes=3), torch.randn(6, 2, generator=seed())
    classes, labels = torch.tensor([0, 1, 2, 0, 1, 2]), torch.tensor([0, 1, 2, 1, 2, 0])
    log_prob = prior.log_prob((classes[:, None], z), labels)
    assert torch.equal(log_prob[3:], torch.full((3,), -math.inf))
    torch.testing.assert_close(log_prob[:3], reference(prior).log_prob(z)[:3])
    codes = prior.sample(6, labels, generator=seed())
    assert torch.equal(codes[0][:, 0], labels)
    CLASSES.check(codes)


def test_a_given_class_must_be_that_of_the_label():
    prior, z = make(CLASSES, num_classes=3), torch.zeros(1, 2)
    given = ((torch.tensor([[1]]), z), (torch.tensor([[True]]), torch.zeros(1, 2, dtype=torch.bool)))
    assert prior.sample(1, torch.tensor([1]), given=given)[0].item() == 1
    with pytest.raises(ValueError, match="a class among the given codes is not that of its label"):
        prior.sample(1, torch.tensor([2]), given=given)


# --- real-valued codes ----------------------------------------------------------------------------------------------


def test_real_levels_have_no_vocabulary_and_no_largest_rate():
    assert VECTOR.max_nats == math.inf
    assert (VECTOR.is_discrete, CLASSES.is_discrete, tiny.SPECS["levels"].is_discrete) == (False, False, True)
    z = torch.randn(2, 4)
    assert torch.equal(LEVELS.flatten(LEVELS.unflatten(z)), z)


@pytest.mark.parametrize(
    ("codes", "message"),
    [
        ((torch.zeros(2, 3).long(),), r"must be floating-point of shape \(batch, 3\), got torch.int64"),
        ((torch.zeros(2, 4),), r"floating-point of shape \(batch, 3\), got torch.float32 of shape \(2, 4\)"),
        ((torch.full((1, 3), math.nan),), "level 0 of the codes must hold finite numbers"),
        ((torch.full((1, 3), math.inf),), "level 0 of the codes must hold finite numbers"),
    ],
)
def test_what_is_not_a_finite_number_is_refused(codes, message):
    with pytest.raises(ValueError, match=message):
        make().log_prob(codes)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"spec": VECTOR, "num_components": 0}, "num_components must be at least 1, got 0"),
        ({"spec": CodeSpec(((2,), (2,)), (5, None))}, "for codes that are real numbers, got CodeSpec"),
        ({"spec": VECTOR, "num_classes": 3}, r"needs the class as the first level .* one integer in \[0, 3\)"),
        ({"spec": CLASSES, "num_classes": 2}, "needs the class as the first level"),
        ({"spec": CodeSpec(((1,),), (3,)), "num_classes": 3}, "for codes that are real numbers"),
        ({"spec": CodeSpec(((2, 2),), (5,)), "num_classes": 3}, "for codes that are real numbers"),
    ],
)
def test_other_code_spaces_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        GaussianMixtureConfig(**options)


@pytest.mark.parametrize("option", [{"top_k": 2}, {"top_p": 0.5}, {"return_log_prob": True}])
def test_options_of_integers_are_refused(option):
    with pytest.raises(ValueError, match="GaussianMixture cannot honour"):
        make().sample(1, **option)


@pytest.mark.parametrize("name", [name for name in PRIORS if name not in tiny.REAL_PRIORS])
def test_priors_over_integers_say_which_prior_takes_real_numbers(name):
    with pytest.raises(ValueError, match=r"holds real numbers; only the prior 'gaussian_mixture'"):
        PRIORS[name].Config(spec=VECTOR, **tiny.PRIORS[name])


def test_the_code_store_refuses_real_numbers_before_it_writes(tmp_path):
    class Encoder(torch.nn.Module):
        spec = VECTOR

    with pytest.raises(ValueError, match="the code store takes integer codes, but level 0"):
        write_codes(tmp_path / "codes", Encoder(), [1], split="train", tokenizer_folder=tmp_path, fingerprint="")
    assert not (tmp_path / "codes").exists()


def test_counts_leave_real_levels_out():
    counts = CodeCounts(CLASSES)
    counts.add((torch.tensor([[0], [0], [2]]), torch.randn(3, 2)))
    counts.merge()
    assert counts.summary()["codebook_usage"] == pytest.approx(2 / 3)
    nothing = CodeCounts(VECTOR)
    nothing.add((torch.randn(3, 3),))
    nothing.merge()
    assert nothing.summary() == nothing.complaints() == {}


@pytest.mark.parametrize("parameter", ["logits", "means", "log_stds"])
def test_nothing_is_drawn_from_what_is_not_a_number(parameter):
    prior = make()
    getattr(prior, parameter).data.view(-1)[0] = math.nan
    with pytest.raises(ValueError, match="are not numbers: the weights are damaged"):
        prior.sample(2)
