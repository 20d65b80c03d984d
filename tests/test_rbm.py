"""Boltzmann and Bernoulli priors against enumeration: energies, log Z, its gradient, samplers, and annealers."""

import copy
import math
from itertools import pairwise

import dimod
import numpy as np
import pytest
import torch
from dwave.samplers import SimulatedAnnealingSampler
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.annealers import binary_quadratic_model, most_probable_codes, sample_set_to_codes, sample_with
from prior import CodeSpec
from prior.annealed_importance import (
    LogPartition,
    annealed_log_weights,
    estimated_log_partition,
    exact_log_partition,
)
from prior.bernoulli import Bernoulli
from prior.bits import BitPriorConfig, bits_to_codes, codes_to_bits, mask_to_bits
from prior.boltzmann_samplers import BitDrawer, BlockGibbs, Boltzmann, exchange_temperatures, reweight_population
from prior.rbm import RBM, RBMConfig
from tokenizer.quantizers import QUANTIZERS

SAMPLERS = ["gibbs", "population_annealing", "parallel_tempering"]
MIXED = CodeSpec(((1, 2), (1,)), (4, 2))  # 5 bits


def vector(num_bits):
    return CodeSpec(((num_bits,),), (2,))


def make(num_left, num_right, scale=1.0, seed=0, spec=None, **options):
    """An RBM with normal parameters; a scale of 1 couples a handful of units strongly."""
    rbm = RBM(RBMConfig(spec=spec or vector(num_left + num_right), num_left=num_left, **options))
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in rbm.parameters():
            parameter.copy_(scale * torch.randn(parameter.shape, generator=g))
    return rbm


def two_modes(num_left, num_right, strength, **options):
    """All zeros and all ones share nearly all of the probability, and equally."""
    rbm = RBM(RBMConfig(spec=vector(num_left + num_right), num_left=num_left, **options))
    with torch.no_grad():
        rbm.weight.fill_(strength)
        rbm.left_bias.fill_(-strength * num_right / 2)
        rbm.right_bias.fill_(-strength * num_left / 2)
    return rbm


def all_states(num_bits):
    return np.array(list(np.ndindex(*[2] * num_bits)))


def log_weights(rbm):
    """-E of every state, from the quadratic form x Q x over all bits."""
    weight, left_bias, right_bias = (p.double().numpy() for p in rbm.boltzmann())
    form = np.diag(np.concatenate([left_bias, right_bias]))
    form[: rbm.num_left, rbm.num_left :] = weight
    states = all_states(rbm.num_bits)
    return np.einsum("si,ij,sj->s", states, form, states)


def distribution(rbm, temperature=1.0):
    weights = np.exp((log_weights(rbm) - log_weights(rbm).max()) / temperature)
    return weights / weights.sum()


def exact_log_z(rbm):
    return np.logaddexp.reduce(log_weights(rbm))


def exact_samples(rbm, n, seed=0):
    """Left and right states of n independent draws."""
    index = np.random.default_rng(seed).choice(2**rbm.num_bits, size=n, p=distribution(rbm))
    states = torch.from_numpy(all_states(rbm.num_bits)[index]).float()
    return states[:, : rbm.num_left].contiguous(), states[:, rbm.num_left :].contiguous()


def exact_gradient(rbm):
    """Means of z_L z_R, z_L and z_R under the model."""
    p, states = distribution(rbm), all_states(rbm.num_bits)
    left, right = states[:, : rbm.num_left], states[:, rbm.num_left :]
    return [np.einsum("s,si,sj->ij", p, left, right), p @ left, p @ right]


def gradient(rbm):
    rbm.zero_grad()
    rbm.log_partition_loss().backward()
    return [p.grad.numpy().copy() for p in (rbm.weight, rbm.left_bias, rbm.right_bias)]


def frequencies(left, right):
    bits = torch.cat([left, right], dim=1).long().numpy()
    numbers = bits @ (2 ** np.arange(bits.shape[1])[::-1])
    return np.bincount(numbers, minlength=2 ** bits.shape[1]) / len(bits)


def assert_frequencies_match(measured, expected, n):
    # five standard deviations of a binomial count, and one count for the rarest
    tolerance = 5 * np.sqrt(expected * (1 - expected) / n) + 1 / n
    assert (np.abs(measured - expected) <= tolerance).all(), np.abs((measured - expected) / tolerance).max()


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


# --- codes as bits --------------------------------------------------------------------------------------------------


@given(st.lists(st.tuples(st.integers(1, 3), st.integers(1, 6)), min_size=1, max_size=3), st.integers(0, 100))
def test_codes_are_their_bits_least_significant_first(levels, seed):
    spec = CodeSpec(tuple((1, length) for length, _ in levels), tuple(2**width for _, width in levels))
    codes = tuple(torch.randint(2**width, (2, 1, length), generator=seeded(seed)) for length, width in levels)
    digits = [
        [
            int(digit)
            for (_, width), level in zip(levels, codes)
            for code in level[i, 0]
            for digit in f"{code:0{width}b}"[::-1]
        ]
        for i in range(2)
    ]
    bits = codes_to_bits(spec, codes)
    assert bits.tolist() == digits
    assert all(torch.equal(a, b) for a, b in zip(bits_to_codes(spec, bits.float()), codes))
    known = tuple(code % 2 == 0 for code in codes)
    all_of_known = tuple(torch.where(mask, 2**width - 1, 0) for mask, (_, width) in zip(known, levels))
    assert torch.equal(mask_to_bits(spec, known), codes_to_bits(spec, all_of_known).bool())


def test_a_vocabulary_of_one_has_no_bits():
    spec = CodeSpec(((2,), (1, 2)), (1, 4))
    codes = (torch.zeros(3, 2, dtype=torch.int64), torch.tensor([[[1, 2]]] * 3))
    assert codes_to_bits(spec, codes).tolist() == [[1, 0, 0, 1]] * 3
    assert all(torch.equal(a, b) for a, b in zip(bits_to_codes(spec, codes_to_bits(spec, codes)), codes))


def test_bits_of_lookup_free_codes_are_the_signs_of_its_channels():
    quantizer = QUANTIZERS["lfq"](num_bits=5)
    codes = (torch.arange(32).reshape(2, 4, 4),)
    signs = quantizer.embed(codes).movedim(1, -1).flatten(1)  # (B, h w D)
    assert torch.equal(codes_to_bits(CodeSpec(((4, 4),), (32,)), codes), (signs > 0).long())


# --- energy and exact log Z -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("sides", [(2, 3), (4, 1), (1, 1)])
def test_energies_and_log_prob_are_those_of_brute_force(sides):
    rbm = make(*sides)
    states = torch.from_numpy(all_states(sum(sides)))
    expected = log_weights(rbm)
    energy = rbm.energy(*states.split(list(sides), dim=1))
    np.testing.assert_allclose(-energy.detach().numpy(), expected, atol=1e-5)
    log_prob = rbm.log_prob((states,)).detach().numpy()
    np.testing.assert_allclose(log_prob, expected - np.logaddexp.reduce(expected), atol=1e-5)


def test_energy_takes_means_and_gives_their_gradients():
    rbm = make(3, 2)
    left, right = torch.rand(4, 3, requires_grad=True), torch.rand(4, 2, requires_grad=True)
    rbm.energy(left, right).sum().backward()
    torch.testing.assert_close(left.grad, -(rbm.left_bias + right @ rbm.weight.T).detach())
    torch.testing.assert_close(right.grad, -(rbm.right_bias + left @ rbm.weight).detach())
    torch.testing.assert_close(rbm.weight.grad, -(left.T @ right).detach())


@settings(max_examples=20)
@given(st.integers(1, 6), st.integers(1, 6), st.integers(0, 1000))
def test_exact_log_z_is_the_sum_over_all_states_whichever_side_is_summed_out(num_left, num_right, seed):
    parameters = make(num_left, num_right, seed=seed).boltzmann()
    expected = exact_log_z(make(num_left, num_right, seed=seed))
    found = exact_log_partition(parameters)
    assert found.value == pytest.approx(expected, abs=1e-6)  # float32 parameters, float64 sums
    assert exact_log_partition(parameters.transposed()).value == pytest.approx(expected, abs=1e-6)
    assert (found.exact, found.lower, found.upper, found.standard_error) == (True, found.value, found.value, 0)
    assert found.agree
    assert found.require() is found


def test_without_couplings_log_z_is_a_sum_of_softplus_also_for_thousands_of_states():
    rbm = make(13, 30)
    with torch.no_grad():
        rbm.weight.zero_()
    biases = torch.cat([rbm.left_bias, rbm.right_bias]).detach().double().numpy()
    assert rbm.log_partition().value == pytest.approx(np.logaddexp(0, biases).sum(), abs=1e-9)


def test_log_z_moves_with_the_energy():
    # E(z) + c - c' z over one unit that is always on is the same model with another zero of energy
    rbm = make(3, 4)
    before = exact_log_partition(rbm.boltzmann()).value
    flipped = Boltzmann(-rbm.weight, rbm.left_bias, rbm.right_bias + rbm.weight.sum(0))  # z_L -> 1 - z_L
    flipped = flipped._replace(left_bias=-rbm.left_bias)
    assert exact_log_partition(flipped).value + rbm.left_bias.sum().item() == pytest.approx(before, abs=1e-5)


def test_sums_over_too_many_states_are_refused():
    rbm = make(17, 18)
    with pytest.raises(ValueError, match="at most 16 units, got sides of 17 and 18"):
        exact_log_partition(rbm.boltzmann())


def test_the_divergence_of_bits_from_the_prior_is_never_negative_and_0_where_they_are_equal():
    rng = np.random.default_rng(0)
    for seed in range(20):
        rbm = make(3, 3, seed=seed)
        q = torch.from_numpy(rng.uniform(0.01, 0.99, 6)).float()
        entropy = -(q * q.log() + (1 - q) * (1 - q).log()).sum()
        kl = rbm.energy(q[None, :3], q[None, 3:]) + rbm.log_partition().value - entropy
        assert kl.item() > 0
    with torch.no_grad():
        rbm.weight.zero_()
    q = torch.cat([rbm.left_bias, rbm.right_bias]).sigmoid()
    entropy = -(q * q.log() + (1 - q) * (1 - q).log()).sum()
    kl = rbm.energy(q[None, :3], q[None, 3:]) + rbm.log_partition().value - entropy
    assert kl.item() == pytest.approx(0, abs=1e-5)


# --- cheap random bits ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_drawn_bits_have_the_probability_of_their_logits(dtype):
    logits = torch.tensor([-torch.inf, -9.0, -3.0, -0.1, 0.0, 2.0, 9.0, torch.inf, 0.5], dtype=dtype)
    n = 200_003  # not a multiple of 4
    out = torch.empty(n, 9, dtype=dtype)
    BitDrawer(n, 9, logits, seeded()).draw_(logits.expand(n, 9).clone(), out=out)
    assert set(out.unique().tolist()) == {0.0, 1.0}
    assert_frequencies_match(out.double().mean(0).numpy(), logits.double().sigmoid().numpy(), n)


def test_probabilities_below_the_16_random_bits_are_exact_too():
    n, p = 2**22, 2**-18  # 16 bits alone would give 0 or 4 times as many
    logits = torch.tensor([math.log(p), -math.log(p)])
    out = torch.empty(n, 2)
    drawer = BitDrawer(n, 2, logits, seeded())
    ones = sum(drawer.draw_(logits.expand(n, 2).clone(), out=out).double().sum(0) for _ in range(6))
    expected = 6 * n * p  # 96
    assert abs(ones[0] - expected) < 5 * math.sqrt(expected)
    assert abs(6 * n - ones[1] - expected) < 5 * math.sqrt(expected)


def test_drawn_bits_are_independent_of_each_other():
    n = 100_000
    logits, out = torch.tensor([0.0, 0.4, -0.3]).expand(n, 3), torch.empty(n, 3)
    drawer = BitDrawer(n, 3, logits, seeded())
    first = drawer.draw_(logits.clone(), out=out).clone()
    second = drawer.draw_(logits.clone(), out=out)
    both = torch.cat([first, second, first.roll(1, 0)], dim=1).T
    correlations = torch.corrcoef(both) - torch.eye(9)
    assert correlations.abs().max() < 5 / math.sqrt(n)


def test_sweeps_leave_the_exact_distribution_as_it_is():
    rbm, n = make(3, 2), 40_000
    gibbs = BlockGibbs(*exact_samples(rbm, n), generator=seeded())
    gibbs.sweep(rbm.boltzmann(), 2)
    assert_frequencies_match(frequencies(gibbs.left, gibbs.right), distribution(rbm), n)


def test_each_chain_of_a_sweep_has_its_own_temperature():
    rbm, n = make(2, 2), 40_000
    times = torch.tensor([0.0, 0.5, 1.0]).repeat_interleave(n)[:, None]
    gibbs = BlockGibbs(torch.zeros(3 * n, 2), torch.zeros(3 * n, 2), inverse_temperatures=times, generator=seeded())
    gibbs.sweep(rbm.boltzmann(), 30)
    for i, temperature in enumerate((1e9, 2.0, 1.0)):
        chains = slice(i * n, (i + 1) * n)
        found = frequencies(gibbs.left[chains], gibbs.right[chains])
        assert_frequencies_match(found, distribution(rbm, temperature), n)


# --- the gradient of log Z ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_the_gradient_of_log_z_is_that_of_enumeration(sampler):
    rbm = make(4, 3, 0.7, sampler=sampler, num_chains=200, num_sweeps=3, num_temperatures=4)
    for _ in range(20):
        rbm.log_partition_loss()
    steps = [gradient(rbm) for _ in range(200)]
    for found, expected in zip(zip(*steps), exact_gradient(rbm)):
        found = np.array(found)
        batches = found.reshape(20, 10, -1).mean(1)  # of steps that are correlated
        error = found.mean(0) - expected
        assert (np.abs(error.ravel()) < 4.5 * batches.std(0, ddof=1) / math.sqrt(20) + 1e-3).all()


def test_one_step_of_many_chains_is_close_to_the_exact_gradient_and_energy():
    rbm = make(8, 8, 0.5, num_chains=1000, num_sweeps=40)
    found, expected = gradient(rbm), exact_gradient(rbm)
    # independent chains: standard deviations of at most 0.5 / sqrt(1000), over 80 entries
    assert max(np.abs(f - e).max() for f, e in zip(found, expected)) < 4.5 * 0.5 / math.sqrt(1000)
    energies = rbm.energy(*rbm.chains.long().split([8, 8], dim=1)).detach().double().numpy()
    mean = -distribution(rbm) @ log_weights(rbm)
    assert abs(energies.mean() - mean) < 4.5 * energies.std() / math.sqrt(1000)


def test_the_other_side_s_mean_has_less_variance_than_its_draw():
    rbm = make(4, 4, 0.7, num_chains=100, num_sweeps=5)
    steps = []
    for _ in range(100):
        averaged = gradient(rbm)[2]
        steps.append((averaged, rbm.chains[:, 4:].double().mean(0).numpy()))
    averaged, drawn = (np.array(part).var(0) for part in zip(*steps))
    assert (averaged < drawn).all()


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_the_loss_has_value_0_moves_the_chains_and_follows_the_global_seed(sampler):
    runs = []
    for seed in (3, 3, 4):
        rbm = make(3, 2, sampler=sampler, num_chains=20)
        torch.manual_seed(seed)
        before = rbm.chains.clone()
        loss = rbm.log_partition_loss()
        loss.backward()
        assert loss.item() == 0
        assert (rbm.chains != before).any()
        assert set(rbm.chains.unique().tolist()) == {0, 1}
        assert all(p.grad.abs().sum() > 0 for p in rbm.parameters())
        runs.append((rbm.chains, rbm.weight.grad))
    assert all(torch.equal(a, b) for a, b in zip(runs[0], runs[1]))
    assert not torch.equal(runs[0][0], runs[2][0])


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_it_learns_the_distribution_of_codes(sampler):
    target = make(2, 3, 0.8, seed=5, spec=MIXED)
    codes = bits_to_codes(MIXED, torch.cat(exact_samples(target, 4000), dim=1))
    rbm = RBM(RBMConfig(spec=MIXED, num_left=2, sampler=sampler, num_sweeps=2, num_temperatures=3))
    optimizer = torch.optim.Adam(rbm.parameters(), lr=0.03)
    for step in range(400):
        optimizer.param_groups[0]["lr"] = 0.05 * (1 - step / 400)
        optimizer.zero_grad()
        rbm(codes)["energy_gap"].backward()
        optimizer.step()
    with torch.no_grad():
        excess = target.log_prob(codes).mean() - rbm.log_prob(codes).mean()
    assert -0.01 < excess.item() < 0.01  # nats; the uniform distribution pays 0.5 more
    assert rbm.complaints() == {}


def test_the_energy_gap_is_the_energy_of_codes_less_that_of_the_chains():
    rbm = make(2, 3, spec=MIXED)
    codes = bits_to_codes(MIXED, torch.randint(2, (7, 5)))
    found = rbm(codes)["energy_gap"].item()
    left = rbm.chains[:, :2].float()
    right = (left @ rbm.weight + rbm.right_bias).sigmoid()  # Rao-Blackwell
    expected = rbm.energy(*rbm.sides(codes)).mean() - rbm.energy(left, right).mean()
    assert found == pytest.approx(expected.item() / 3, abs=1e-5)  # per code


# --- population annealing and parallel tempering --------------------------------------------------------------------


def test_reweighting_turns_samples_of_one_model_into_those_of_another():
    old, new, n = make(3, 2, 0.6), make(3, 2, 0.6, seed=1), 100_000
    left, right, log_ratio = reweight_population(*exact_samples(old, n), old.boltzmann(), new.boltzmann(), seeded())
    weights = distribution(new) / distribution(old)
    spread = math.sqrt((distribution(old) * (weights - 1) ** 2).sum() / n)
    assert abs(log_ratio.item() - (exact_log_z(new) - exact_log_z(old))) < 5 * spread
    assert np.abs(frequencies(left, right) - distribution(new)).max() < 5 * spread


def test_population_annealing_reweights_a_change_of_the_parameters_once():
    rbm = two_modes(4, 4, 9.0, sampler="population_annealing", num_sweeps=1)
    for _ in range(2):
        gradient(rbm)  # from the uniform distribution of the first chains
    assert all(torch.equal(getattr(rbm, f"old_{name}"), p) for name, p in rbm.boltzmann()._asdict().items())
    before = rbm.chains.clone()
    gradient(rbm)
    assert (rbm.chains != before).float().mean() < 0.01  # rows stay where they are, as do chains in these modes
    with torch.no_grad():
        rbm.left_bias += 0.5  # all ones are e^2 times as probable as all zeros
    gradient(rbm)
    expected = 1 / (1 + math.exp(-2))
    assert rbm.chains.float().mean().item() == pytest.approx(expected, abs=0.08)  # from near a half


def test_resampling_is_systematic():
    # chain i has weight 2^i: it is kept floor or ceil of n 2^i / 15 times, in order
    left, right = torch.arange(4.0)[:, None], torch.zeros(4, 1)
    old, new = (Boltzmann(torch.zeros(1, 1), torch.tensor([b]), torch.zeros(1)) for b in (0.0, math.log(2)))
    counts = np.zeros(4)
    for seed in range(500):
        kept, _, _ = reweight_population(left, right, old, new, seeded(seed))
        count = np.bincount(kept[:, 0].long(), minlength=4)
        expected = 4 * 2.0 ** np.arange(4) / 15
        assert ((count == np.floor(expected)) | (count == np.ceil(expected))).all()
        counts += count / 500
    np.testing.assert_allclose(counts, 4 * 2.0 ** np.arange(4) / 15, atol=0.1)


def track_log_z(num_steps, num_chains=1000):
    """Population annealing from W = 0 to a strong 24-bit RBM: the RBM, the sum of log ratios, the chains at the end."""
    rbm = make(12, 12, 0.8)
    steps = [rbm.boltzmann().scaled(i / num_steps) for i in range(num_steps + 1)]
    left, right = torch.randint(2, (2, num_chains, 12), generator=seeded()).float()
    tracked = 24 * math.log(2)
    for old, new in pairwise(steps):
        left, right, log_ratio = reweight_population(left, right, old, new, seeded(int(1e6 * tracked)))
        gibbs = BlockGibbs(left, right, generator=seeded(int(1e6 * tracked) + 1))
        gibbs.sweep(new, 2)
        tracked += log_ratio.item()
    return rbm, tracked, gibbs


def test_population_annealing_tracks_log_z_and_draws_fair_samples():
    rbm, tracked, gibbs = track_log_z(80)
    assert tracked == pytest.approx(rbm.log_partition().value, abs=0.15)
    parameters = rbm.boltzmann()
    energies = parameters.energy(gibbs.left, gibbs.right)
    # the mean energy is -d log Z(t) / dt at t = 1
    change = [exact_log_partition(parameters.scaled(t)).value for t in (0.999, 1.001)]
    mean = -(change[1] - change[0]) / 0.002
    assert abs(energies.mean().item() - mean) < 6 * energies.std().item() / math.sqrt(1000)


def test_exchanges_leave_all_temperatures_as_they_are():
    rbm, n, times = make(2, 2), 40_000, torch.tensor([0.0, 0.4, 1.0])
    parameters = rbm.boltzmann()
    sides = [exact_samples(scaled(rbm, t.item()), n, seed=i) for i, t in enumerate(times)]
    left, right = (torch.stack(side) for side in zip(*sides))
    before = left.clone()
    for first in (0, 1):
        exchange_temperatures(left, right, parameters, times, first=first, generator=seeded(first))
    assert (left != before).any()
    for i, t in enumerate(times):
        assert_frequencies_match(frequencies(left[i], right[i]), distribution(scaled(rbm, t.item())), n)


def scaled(rbm, inverse_temperature):
    other = make(rbm.num_left, rbm.num_right)
    other.load_state_dict(dict(rbm.state_dict()))
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(inverse_temperature)
    return other


@pytest.mark.parametrize(("sampler", "mixes"), [("gibbs", False), ("parallel_tempering", True)])
@pytest.mark.parametrize("num_sweeps", [1, 4])
def test_tempering_finds_the_mode_that_gibbs_chains_do_not(sampler, mixes, num_sweeps):
    rbm = two_modes(6, 6, 3.0, sampler=sampler, num_sweeps=num_sweeps, num_temperatures=8)
    rbm.start_chains((torch.zeros(1, 12, dtype=torch.int64),))
    for _ in range(200 // num_sweeps):
        rbm.log_partition_loss()
    in_second_mode = (rbm.chains.float().mean(1) > 0.5).float().mean().item()
    assert in_second_mode == pytest.approx(0.5, abs=0.2) if mixes else in_second_mode == 0


# --- annealed importance sampling -----------------------------------------------------------------------------------


def estimate(rbm, num_chains=256, num_temperatures=200, seed=0):
    """From chains that have mixed, as `RBM.log_partition` does."""
    left, right = torch.zeros(num_chains, rbm.num_left), torch.zeros(num_chains, rbm.num_right)
    BlockGibbs(left, right, generator=seeded(seed + 100)).sweep(rbm.boltzmann(), 100)
    generator = seeded(seed)
    return estimated_log_partition(rbm.boltzmann(), left, right, num_temperatures=num_temperatures, generator=generator)


@pytest.mark.parametrize(
    ("sides", "scale"), [((6, 20), 0.3), ((20, 6), 0.5), ((8, 8), 1.0), ((10, 12), 0.8), ((4, 30), 1.5)]
)
def test_both_estimates_of_log_z_are_close_to_enumeration(sides, scale):
    rbm = make(*sides, scale)
    exact, found = rbm.log_partition().value, estimate(rbm)
    assert abs(found.lower - exact) < 3 * found.standard_error + 0.02
    assert abs(found.upper - exact) < 3 * found.standard_error + 0.02
    assert (found.exact, found.agree, found.value) == (False, True, found.lower)
    assert 0 < found.standard_error < 0.1
    assert 100 < found.effective_sample_size <= 256


def path(rbm):
    base_left, base_right = torch.linspace(-1, 1, rbm.num_left), torch.linspace(0.5, -0.5, rbm.num_right)
    base = make(rbm.num_left, rbm.num_right)
    with torch.no_grad():
        for parameter, value in zip((base.weight, base.left_bias, base.right_bias), (0.0, base_left, base_right)):
            parameter.copy_(torch.as_tensor(value))
    return base, base_left, base_right


def test_importance_weights_are_unbiased_in_both_directions():
    rbm, n = make(3, 3, 1.2), 20_000
    base, base_left, base_right = path(rbm)
    times = torch.linspace(0, 1, 4).tolist()  # few, so that the weights matter
    log_ratio = exact_log_z(rbm) - exact_log_z(base)
    for start, path_times, sign in ((base, times, 1), (rbm, times[::-1], -1)):
        left, _ = exact_samples(start, n)
        weights = annealed_log_weights(rbm.boltzmann(), base_left, base_right, left, path_times, seeded())
        ratios = (weights - sign * log_ratio).exp()
        assert abs(ratios.mean() - 1) < 4 * ratios.std() / math.sqrt(n)
        assert ratios.std() > 0.1
        assert weights.mean() < sign * log_ratio  # Jensen: low forwards, high backwards


def test_more_temperatures_shrink_the_variance_of_the_log_weights():
    rbm = make(6, 8, 1.0)
    _, base_left, base_right = path(rbm)
    variances = []
    for num_temperatures in (3, 10, 100):
        left = torch.bernoulli(base_left.sigmoid().expand(500, -1), generator=seeded())
        times = torch.linspace(0, 1, num_temperatures).tolist()
        variances.append(annealed_log_weights(rbm.boltzmann(), base_left, base_right, left, times, seeded()).var())
    assert variances[0] > 3 * variances[1] > 9 * variances[2]


def test_the_standard_error_is_the_spread_over_repetitions():
    rbm = make(8, 8, 1.0)
    runs = [estimate(rbm, num_chains=64, num_temperatures=20, seed=seed) for seed in range(40)]
    spread = np.std([run.lower for run in runs])
    assert np.mean([run.standard_error for run in runs]) == pytest.approx(spread, rel=0.4)


def test_a_mean_of_log_ratios_without_resampling_is_no_substitute():
    """Summing log-means over temperatures, each from chains that lag behind, errs lower than the products' mean."""
    rbm = make(12, 12, 1.5)
    exact = rbm.log_partition().value
    steps = [rbm.boltzmann().scaled(t.item()) for t in torch.linspace(0, 1, 11)]
    left, right = torch.randint(2, (2, 2000, 12), generator=seeded()).float()
    gibbs, log_weights, sum_of_log_means = BlockGibbs(left, right, generator=seeded(1)), 0, 24 * math.log(2)
    for old, new in pairwise(steps):
        change = (old.energy(left, right) - new.energy(left, right)).double()
        log_weights = log_weights + change
        sum_of_log_means += change.logsumexp(0).item() - math.log(2000)
        gibbs.sweep(new)
    importance = log_weights.logsumexp(0).item() - math.log(2000) + 24 * math.log(2)
    assert sum_of_log_means - exact < -0.3
    assert abs(importance - exact) < 0.5 * abs(sum_of_log_means - exact)


def test_a_bracket_that_disagrees_is_refused_and_gives_the_larger_value():
    rbm = two_modes(5, 5, 1.5)
    found = estimated_log_partition(rbm.boltzmann(), *exact_samples(rbm, 50), num_temperatures=3, generator=seeded())
    assert found.gap == found.upper - found.lower > 0.1
    assert not found.agree
    assert found.value == found.upper
    with pytest.raises(
        ValueError, match=rf"{found.lower:.3f} nats from the base and {found.upper:.3f} from the chains"
    ):
        found.require()
    assert LogPartition(2.0, 1.0, 0.1, 10.0, False).value == 2.0
    assert LogPartition(2.0, 2.05, 0.1, 10.0, False).value == 2.0


def large(**options):
    rbm = make(17, 18, 0.2, ais_chains=32, ais_temperatures=50, burn_in=10, num_chains=20, **options)
    rbm.log_partition_loss()
    return rbm


def test_log_z_is_computed_once_for_the_same_parameters_and_touches_nothing():
    rbm = large()
    chains, state = rbm.chains.clone(), torch.get_rng_state()
    first = rbm.log_partition()
    assert rbm.log_partition() is first
    assert not first.exact
    assert torch.equal(rbm.chains, chains)
    assert torch.equal(torch.get_rng_state(), state)
    again = make(17, 18, 0.2, ais_chains=32, ais_temperatures=50, burn_in=10, num_chains=20)
    again.load_state_dict(rbm.state_dict())
    assert again.log_partition() == first
    with torch.no_grad():
        rbm.right_bias[0] += 0.1
    assert rbm.log_partition() != first


def test_an_estimate_of_log_z_tells_how_far_it_has_come():
    told = []
    large().log_partition(lambda done, total: told.append((done, total)))
    assert told == [(done, 98) for done in range(1, 99)]  # from one of 50 temperatures to the next, both ways
    make(3, 4, 0.2).log_partition(lambda done, total: told.append(None))
    assert None not in told  # sums take no time


@pytest.mark.parametrize(("name", "value"), [("ais_temperatures", 500), ("ais_chains", 256), ("burn_in", 40)])
def test_log_z_is_estimated_anew_where_its_sizes_were_raised(name, value):
    rbm = large()
    first = rbm.log_partition()
    setattr(rbm, name, value)
    raised = rbm.log_partition()
    assert raised != first
    assert rbm.log_partition() is raised
    sizes = {"num_chains": 20, "ais_chains": 32, "ais_temperatures": 50, "burn_in": 10, name: value}
    other = make(17, 18, 0.2, **sizes)
    other.load_state_dict(rbm.state_dict())
    assert other.log_partition() == raised


@pytest.mark.parametrize(("name", "least"), [("ais_temperatures", 2), ("ais_chains", 2), ("burn_in", 1)])
def test_log_z_is_not_estimated_by_sizes_that_are_too_small(name, least):
    rbm = large()
    setattr(rbm, name, least - 1)
    with pytest.raises(ValueError, match=f"{name} must be at least {least}, got {least - 1}"):
        rbm.log_partition()


def test_a_refused_log_z_is_mended_as_its_error_says():
    rbm = make(17, 18, 1.0, ais_chains=16, ais_temperatures=3, burn_in=50)
    advice = (
        r"raise ais_temperatures .*pipeline.prior.ais_temperatures = 10_000, or evaluate.py --ais_temperatures 10000"
    )
    with pytest.raises(ValueError, match=advice):
        rbm.log_partition().require()
    rbm.ais_temperatures = 400
    assert rbm.log_partition().require().agree
    assert rbm.complaints() == {}


def test_log_z_of_a_model_that_is_not_summed_is_close_too():
    rbm = make(17, 18, 0.3, ais_chains=128, ais_temperatures=200, burn_in=30)
    parameters = rbm.boltzmann()
    left = (torch.arange(2**17)[:, None] >> torch.arange(17) & 1).float()
    terms = left @ parameters.left_bias + torch.nn.functional.softplus(
        left @ parameters.weight + parameters.right_bias
    ).sum(1)
    exact = terms.double().logsumexp(0).item()
    found = rbm.log_partition()
    assert abs(found.value - exact) < 3 * found.standard_error + 0.02
    assert found.require() is found
    codes = (torch.randint(2, (3, 35)),)
    expected = -rbm.energy(*rbm.sides(codes)) - found.value
    torch.testing.assert_close(rbm.log_prob(codes), expected)


# --- chains ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_saved_and_loaded_rbm_takes_the_same_next_steps(sampler):
    rbm = make(3, 3, sampler=sampler, num_chains=10, num_sweeps=3)
    optimizer = torch.optim.SGD(rbm.parameters(), lr=0.1)
    gradient(rbm)
    optimizer.step()
    other = make(3, 3, seed=9, sampler=sampler, num_chains=10, num_sweeps=3)
    other.load_state_dict({name: tensor.clone() for name, tensor in rbm.state_dict().items()})
    results = []
    for model in (rbm, other):
        torch.manual_seed(7)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(3):
            gradient(model)
            optimizer.step()
        results.append(model.state_dict())
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_processes_start_chains_of_their_own_and_name_what_is_theirs(sampler):
    states = []
    for process in range(2):
        torch.manual_seed(0)
        rbm = make(5, 5, sampler=sampler)  # alike on all processes
        torch.manual_seed(process)
        rbm.log_partition_loss()
        states.append(rbm.state_dict())
    differ = {name for name in states[0] if not torch.equal(states[0][name], states[1][name])}
    assert differ == set(rbm.per_process_buffers) - {"num_updates"}


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_chains_may_start_from_codes(sampler):
    rbm = two_modes(4, 4, 6.0, sampler=sampler, num_chains=7, num_sweeps=1)
    codes = (torch.tensor([[1] * 8, [0] * 8]),)
    rbm.start_chains(codes)
    assert rbm.chains.float().mean(1).tolist() == [1, 0, 1, 0, 1, 0, 1]
    if sampler != "parallel_tempering":
        rbm.log_partition_loss()  # chains as frozen as these stay there
        assert rbm.chains.float().mean().item() == pytest.approx(4 / 7, abs=0.1)
    with pytest.raises(ValueError, match=r"lie in \[0, 2\)"):
        rbm.start_chains((torch.full((1, 8), 2),))
    with pytest.raises(ValueError, match="at least one image"):
        rbm.start_chains((torch.empty((0, 8), dtype=torch.int64),))


@pytest.mark.parametrize("sampler", ["gibbs", "population_annealing"])
def test_frozen_chains_are_noticed(sampler):
    rbm = two_modes(4, 4, 9.0, sampler=sampler)
    assert math.isnan(rbm.autocorrelation)
    assert rbm.complaints() == {}
    rbm.start_chains((torch.tensor([[1] * 8] * 100 + [[0] * 8] * 100),))
    with torch.no_grad():
        rbm.left_bias += 0.5  # resampling shifts rows, which is no mixing
    rbm.log_partition_loss()
    assert rbm.autocorrelation > 0.98
    assert "over 5 sweeps their states keep a correlation of 1.000" in rbm.complaints()["chains"]


def test_chains_that_are_all_alike_are_frozen_too():
    rbm = two_modes(4, 4, 9.0)
    rbm.start_chains((torch.zeros(1, 8, dtype=torch.int64),))
    rbm.log_partition_loss()
    assert rbm.autocorrelation == 1
    assert "chains" in rbm.complaints()


def test_chains_without_couplings_forget_their_state():
    rbm = make(20, 20, num_chains=1000)
    with torch.no_grad():
        rbm.weight.zero_()
    rbm.log_partition_loss()
    rbm.log_partition_loss()
    assert rbm.autocorrelation == pytest.approx(0, abs=0.03)  # 40 000 bits
    assert rbm.complaints() == {}


def test_one_chain_alone_is_not_called_frozen():
    rbm = make(20, 20, 0.1, num_chains=1)
    rbm.log_partition_loss()
    assert rbm.complaints() == {}


def test_large_weights_and_disagreeing_estimates_are_said_with_their_numbers():
    rbm = make(17, 18, 2.5, ais_chains=8, ais_temperatures=2, burn_in=1)
    with torch.no_grad():
        rbm.weight[0, 0] = -12.5
    found = rbm.log_partition()
    complaints = rbm.complaints()
    assert "12.5 nats, more than 10" in complaints["weights"]
    assert f"disagree: {found.lower:.2f} and {found.upper:.2f} nats" in complaints["log Z"]


# --- sampling -------------------------------------------------------------------------------------------------------


def sampled_frequencies(prior, codes):
    bits = codes_to_bits(prior.spec, codes)
    return frequencies(bits[:, :1], bits[:, 1:])


@pytest.mark.parametrize("temperature", [0.5, 3.0])
def test_temperature_scales_the_energy(temperature):
    rbm, n = make(2, 3, 0.7, spec=MIXED, burn_in=40), 10_000
    codes = rbm.sample(n, temperature=temperature, generator=seeded())
    assert_frequencies_match(sampled_frequencies(rbm, codes), distribution(rbm, temperature), n)


def test_a_temperature_near_0_gives_local_modes():
    rbm = make(3, 3, burn_in=20)
    codes = rbm.sample(50, temperature=1e-30, generator=seeded())
    left, right = rbm.sides(codes)
    assert torch.equal(left, (right @ rbm.weight.T + rbm.left_bias > 0).float())
    assert torch.equal(right, (left @ rbm.weight + rbm.right_bias > 0).float())


def test_given_codes_condition_the_others():
    rbm, n = make(2, 3, spec=MIXED, burn_in=40), 10_000
    codes = (torch.tensor([[[2, 1]]]).expand(n, 1, 2), torch.tensor([[1]]).expand(n, 1))
    known = (torch.tensor([[[True, False]]]).expand(n, 1, 2), torch.tensor([[True]]).expand(n, 1))
    sampled = rbm.sample(n, given=(codes, known), generator=seeded())
    expected = distribution(rbm).reshape([2] * 5)
    conditional = np.zeros_like(expected)
    conditional[0, 1, :, :, 1] = expected[0, 1, :, :, 1] / expected[0, 1, :, :, 1].sum()  # 2 is the bits 0, 1
    assert_frequencies_match(sampled_frequencies(rbm, sampled), conditional.ravel(), n)


def test_the_first_sweep_knows_the_given_codes():
    rbm = two_modes(4, 4, 20.0, num_chains=3, burn_in=1)
    rbm.start_chains((torch.zeros(1, 8, dtype=torch.int64),))
    ones = torch.ones(5, 8, dtype=torch.int64)
    left = (torch.arange(8) < 4).expand(5, 8)
    assert torch.equal(rbm.sample(5, given=((ones,), (left,)), generator=seeded())[0], ones)


def test_sampling_begins_at_the_chains_and_shows_its_burn_in():
    rbm, calls = two_modes(4, 4, 20.0, num_chains=5, burn_in=3), []
    starts = torch.tensor([[1] * 8, [0] * 8, [0] * 8, [0] * 8, [0] * 8])
    rbm.start_chains((starts,))
    codes = rbm.sample(2000, generator=seeded(), callback=lambda done, total: calls.append((done, total)))
    assert calls == [(1, 3), (2, 3), (3, 3)]
    assert codes[0].float().mean().item() == pytest.approx(0.2, abs=0.05)  # one chain in five
    assert torch.equal(rbm.chains.long(), starts)
    rbm.burn_in = 20
    rbm.sample(1, callback=lambda done, total: calls.append((done, total)))
    assert calls[-1] == (20, 20)


def test_images_do_not_depend_on_how_the_noise_is_cut_into_parts():
    rbm = make(2, 3, spec=MIXED, burn_in=9)
    long = rbm.sample(20, generator=seeded())
    rbm.burn_in = 17
    assert not torch.equal(long[0], rbm.sample(20, generator=seeded())[0])
    rbm.burn_in = 9
    assert torch.equal(long[0], rbm.sample(20, generator=seeded())[0])


@pytest.mark.parametrize("kind", ["rbm", "bernoulli"])
def test_impossible_options_are_refused(kind):
    prior = make(2, 3, spec=MIXED) if kind == "rbm" else Bernoulli(BitPriorConfig(spec=MIXED))
    supported = {"rbm": "given, temperature", "bernoulli": "given, return_log_prob, temperature"}[kind]
    with pytest.raises(ValueError, match=f"cannot honour top_k; it supports {supported}$"):
        prior.sample(1, top_k=2)
    with pytest.raises(ValueError, match="unconditional"):
        prior.sample(1, torch.tensor([0]))
    with pytest.raises(ValueError, match="unconditional"):
        prior(bits_to_codes(MIXED, torch.zeros(1, 5)), torch.tensor([0]))
    with pytest.raises(ValueError, match=r"level 0 .* lie in \[0, 4\), got values from 4 to 4"):
        prior.log_prob((torch.full((1, 1, 2), 4), torch.zeros(1, 1, dtype=torch.int64)))
    if kind == "rbm":
        with pytest.raises(ValueError, match="RBM cannot honour temperature 0"):
            prior.sample(1, temperature=0.0)


# --- precision ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["rbm", "bernoulli"])
def test_energies_are_float32_also_under_autocast_and_in_half_precision(kind):
    prior = make(20, 20, 0.3) if kind == "rbm" else Bernoulli(BitPriorConfig(spec=vector(40)))
    with torch.no_grad():
        for parameter in prior.parameters():
            parameter.copy_(parameter.bfloat16())
    codes = (torch.randint(2, (5, 40)),)
    states = codes_to_bits(prior.spec, codes).bfloat16().split([20, 20], dim=1)
    expected = prior.energy(*prior.sides(codes))
    gradients = []
    for inside in (False, True):
        again = copy.deepcopy(prior)
        with torch.autocast("cpu", torch.bfloat16, enabled=inside):
            assert torch.equal(again.energy(*states), expected)
            torch.manual_seed(0)
            loss = again.log_partition_loss()
        assert loss.dtype == torch.float32
        gradients.append(torch.autograd.grad(loss, list(again.parameters())))
    assert all(torch.equal(*pair) for pair in zip(*gradients))
    prior = prior.bfloat16()
    assert torch.equal(prior.energy(*states), expected)
    prior.spec.check(prior.sample(2, generator=seeded()))


# --- configuration --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"spec": CodeSpec(((2, 2),), (3,))}, r"powers of two, got CodeSpec\(.*vocab_sizes=\(3,\)\); gpt, pixelcnn"),
        ({"spec": CodeSpec(((1,),), (2,))}, "at least 2 of them, one of each side, got 1 in CodeSpec"),
        ({"num_classes": 3}, "unconditional: num_classes must be 0, got 3"),
        ({"num_left": 5}, r"num_left must lie in \[1, 5\), .* got 5"),
        ({"num_left": 0}, r"num_left must lie in \[1, 5\), .* got 0"),
        ({"num_chains": 0}, "num_chains must be at least 1, got 0"),
        ({"num_sweeps": 0}, "num_sweeps must be at least 1, got 0"),
        ({"burn_in": 0}, "burn_in must be at least 1, got 0"),
        ({"num_temperatures": 1}, "num_temperatures must be at least 2, got 1"),
        ({"ais_chains": 1}, "ais_chains must be at least 2, got 1"),
        ({"ais_temperatures": 1}, "ais_temperatures must be at least 2, got 1"),
        ({"sampler": "pcd"}, "unknown sampler 'pcd'; choose from gibbs, population_annealing, parallel_tempering"),
    ],
)
def test_configurations_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        RBMConfig(**{"spec": MIXED, **options})


def test_the_left_side_is_the_first_half_of_the_bits():
    rbm = RBM(RBMConfig(spec=MIXED))
    assert (rbm.num_left, rbm.num_right, tuple(rbm.weight.shape)) == (3, 2, (3, 2))
    left, right = rbm.sides((torch.tensor([[[1, 2]]]), torch.tensor([[1]])))
    assert (left.tolist(), right.tolist()) == ([[1, 0, 0]], [[1, 1]])


# --- independent bits -----------------------------------------------------------------------------------------------


def bernoulli():
    prior = Bernoulli(BitPriorConfig(spec=MIXED, num_left=2))
    with torch.no_grad():
        for parameter in prior.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=seeded()))
    return prior


def test_independent_bits_are_an_rbm_without_couplings():
    prior, rbm = bernoulli(), make(2, 3, spec=MIXED)
    with torch.no_grad():
        rbm.weight.zero_()
        rbm.left_bias.copy_(prior.left_bias)
        rbm.right_bias.copy_(prior.right_bias)
    codes = bits_to_codes(MIXED, torch.from_numpy(all_states(5)))
    sides = torch.rand(6, 2), torch.rand(6, 3)
    torch.testing.assert_close(prior.energy(*sides), rbm.energy(*sides))
    torch.testing.assert_close(prior.log_prob(codes), rbm.log_prob(codes))
    assert prior.log_partition().value == pytest.approx(rbm.log_partition().value)
    assert prior.log_partition_loss().item() == pytest.approx(prior.log_partition().value, abs=1e-5)
    assert prior.complaints() == {}
    prior.log_partition_loss().backward()
    torch.testing.assert_close(prior.left_bias.grad, prior.left_bias.sigmoid().detach())
    torch.testing.assert_close(prior.right_bias.grad, prior.right_bias.sigmoid().detach())


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_independent_bits_at_other_temperatures(temperature):
    prior, n = bernoulli(), 10_000
    p = prior.log_prob(bits_to_codes(MIXED, torch.from_numpy(all_states(5)))).detach().double().numpy()
    expected = np.exp(p / temperature) / np.exp(p / temperature).sum()
    codes = prior.sample(n, temperature=temperature, generator=seeded())
    assert_frequencies_match(sampled_frequencies(prior, codes), expected, n)


def test_independent_bits_at_temperature_0_are_the_most_probable_ones():
    prior = bernoulli()
    codes = bits_to_codes(MIXED, torch.from_numpy(all_states(5)))
    best = prior.log_prob(codes).argmax()
    sampled = prior.sample(3, temperature=0.0)
    assert all((s == c[best]).all() for s, c in zip(sampled, codes))
    with torch.no_grad():
        prior.left_bias.zero_()
    assert (
        prior.sample(3, temperature=1e-46, return_log_prob=True).log_prob.tolist() == [0.0] * 3
    )  # 1e-46 is 0 in float32


# --- annealing samplers ---------------------------------------------------------------------------------------------


def test_the_binary_quadratic_model_has_the_energies_of_all_states():
    rbm = make(2, 3, spec=MIXED)
    with torch.no_grad():
        rbm.weight[0, 1] = 0
    model = binary_quadratic_model(rbm)
    assert model == binary_quadratic_model(torch.compile(rbm, backend="eager"))
    np.testing.assert_allclose(model.energies((all_states(5), range(5))), -log_weights(rbm), atol=1e-12)
    assert (model.num_variables, model.num_interactions) == (5, 5)


def test_an_exact_solver_finds_the_mode_of_brute_force():
    for seed in range(5):
        rbm = make(3, 2, seed=seed, spec=MIXED)
        expected = bits_to_codes(MIXED, torch.from_numpy(all_states(5)[[log_weights(rbm).argmax()]]))
        found = most_probable_codes(dimod.ExactSolver(), rbm)
        MIXED.check(found)
        assert all(torch.equal(a, b) for a, b in zip(found, expected))


def test_simulated_annealing_draws_from_the_prior_and_finds_its_mode():
    rbm, n, annealer = make(2, 3, 0.7, spec=MIXED), 2000, SimulatedAnnealingSampler()
    codes = sample_with(annealer, rbm, n, seed=1, num_sweeps=100, beta_range=(0.01, 1.0))
    MIXED.check(codes)
    assert_frequencies_match(sampled_frequencies(rbm, codes), distribution(rbm), n)
    large = make(20, 20, seed=2)
    mode = most_probable_codes(annealer, large, seed=1, num_reads=50)
    left, right = large.sides(mode)
    others = large.sides(large.sample(200, generator=seeded()))
    assert large.energy(left, right).item() <= large.energy(*others).min().item()


def test_samples_come_back_in_the_order_of_the_bits_and_as_often_as_they_occurred():
    rbm, bits = make(2, 3, spec=MIXED), np.array([[1, 0, 0, 1, 1], [0, 1, 0, 0, 1]])
    reordered = dimod.SampleSet.from_samples(
        (bits[:, ::-1], [4, 3, 2, 1, 0]), dimod.BINARY, energy=[0, 0], num_occurrences=[1, 2], sort_labels=False
    )
    assert list(reordered.variables) == [4, 3, 2, 1, 0]
    expected = codes_to_bits(MIXED, sample_set_to_codes(rbm, reordered)).tolist()
    assert expected == [bits[0].tolist(), bits[1].tolist(), bits[1].tolist()]
    spins = reordered.change_vartype(dimod.SPIN, inplace=False)
    assert codes_to_bits(MIXED, sample_set_to_codes(rbm, spins)).tolist() == expected


def test_samplers_and_samples_that_do_not_fit_are_refused():
    rbm = make(2, 3, spec=MIXED)
    with pytest.raises(ValueError, match="ExactSolver has no option num_reads; it has none"):
        sample_with(dimod.ExactSolver(), rbm, 3)
    with pytest.raises(ValueError, match=r"RandomSampler has no option sweeps; it has .*num_reads"):
        sample_with(dimod.RandomSampler(), rbm, 3, sweeps=3)
    others = dimod.RandomSampler().sample(binary_quadratic_model(make(2, 2)), num_reads=2)
    with pytest.raises(ValueError, match="the samples have 4 variables, the RBM has the bits 0 to 4"):
        sample_set_to_codes(rbm, others)


# --- longer checks, by hand -----------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("sides", [(20, 20), (14, 60)])
@pytest.mark.parametrize("scale", [0.1, 0.3, 0.5, 0.8, 1.2])
def test_a_thousand_temperatures_give_log_z_to_a_hundredth(sides, scale):
    rbm = make(*sides, scale)
    weight, left_bias, right_bias = (p.double() for p in rbm.boltzmann())
    terms = []
    for numbers in torch.arange(2 ** sides[0]).split(2**14):
        left = (numbers[:, None] >> torch.arange(sides[0]) & 1).double()
        terms.append((left @ left_bias + torch.nn.functional.softplus(left @ weight + right_bias).sum(1)).logsumexp(0))
    exact = torch.stack(terms).logsumexp(0).item()
    found = estimate(rbm, num_chains=1024, num_temperatures=1000)
    assert abs(found.lower - exact) < 0.015
    assert abs(found.upper - exact) < 0.03
    assert found.agree


@pytest.mark.slow
@pytest.mark.parametrize(("num_temperatures", "error"), [(100, 0.25), (1000, 0.08)])
def test_two_modes_are_harder_and_temperatures_help(num_temperatures, error):
    rbm = two_modes(10, 10, 1.5)
    gibbs = BlockGibbs(*exact_samples_of_modes(rbm, 256), generator=seeded())
    found = estimated_log_partition(
        rbm.boltzmann(), gibbs.left, gibbs.right, num_temperatures=num_temperatures, generator=seeded()
    )
    assert abs(found.lower - rbm.log_partition().value) < error


def exact_samples_of_modes(rbm, n):
    bits = (torch.arange(n) % 2).float()[:, None]
    gibbs = BlockGibbs(bits.repeat(1, rbm.num_left), bits.repeat(1, rbm.num_right), generator=seeded())
    gibbs.sweep(rbm.boltzmann(), 50)
    return gibbs.left, gibbs.right


@pytest.mark.slow
def test_persistent_chains_of_the_published_size_give_the_gradient():
    rbm = make(14, 14, 0.4, num_chains=1000, num_sweeps=40)
    parameters = Boltzmann(*(p.clone().double().requires_grad_() for p in rbm.boltzmann()))
    places = torch.arange(14)
    left = (torch.arange(2**14)[:, None] >> places & 1).double()
    log_z = (left @ parameters.left_bias + torch.nn.functional.softplus(
        left @ parameters.weight + parameters.right_bias).sum(1)).logsumexp(0)  # fmt: skip
    log_z.backward()
    found = gradient(rbm)
    errors = [np.abs(f - p.grad.numpy()).max() for f, p in zip(found, parameters)]
    assert max(errors) < 0.05


@pytest.mark.slow
def test_the_log_z_that_population_annealing_tracks_stays_near_over_many_updates():
    rbm, tracked, _ = track_log_z(400)
    assert tracked == pytest.approx(rbm.log_partition().value, abs=0.2)
