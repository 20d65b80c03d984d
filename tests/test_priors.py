"""Laws of every registered prior, on code spaces small enough to enumerate: all codes, all probabilities."""

import copy
import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import prune
from torch.nn.utils.parametrizations import weight_norm

from prior import PRIORS, CodeSpec, PriorConfig
from prior.autoregressive import AutoregressiveConfig, AutoregressivePrior, structure
from prior.base import Prior
from prior.gpt import Attention, GPTConfig, coordinates, rotary_angles, rotary_table, rotate
from prior.pixelcnn import GatedPixelCNN, PixelCNN, PixelCNNConfig
from prior.pixelsnail import CausalAttention, CausalConv, PixelSNAILConfig, background
from prior.sampling import ImageNoise, SamplingOptions, draw, final_logits
from prior.torchvision_guard import ensure_torchvision
from prior.uniform import Uniform
from tests import tiny

NUM_SAMPLES = 10_000
AUTOREGRESSIVE = [name for name, kind in PRIORS.items() if issubclass(kind, AutoregressivePrior)]
LEARNABLE = [name for name in PRIORS if name != "uniform"]
# Every branch of the autoregressive priors' code.
VARIANTS = {
    **{name: (name, {}) for name in AUTOREGRESSIVE},
    "pixelcnn-kernel_5": ("pixelcnn", {"kernel_size": 5, "num_layers": 1}),
    "pixelsnail-kernel_5": ("pixelsnail", {"kernel_size": 5, "num_blocks": 1, "num_heads": 1}),
    "gpt-rotary_2d": ("gpt", {"positions": "rotary_2d"}),
    "gpt-rotary": ("gpt", {"positions": "rotary"}),
}
# Two maps of different proportions and a vector, with different vocabularies.
LARGER = CodeSpec(((2, 3), (4, 5), (3,)), (5, 7, 2))


def build(name, spec, num_classes=0, spread=0.4, **options):
    """The tiny prior, with parameters far from their initial values: a fresh network hardly looks at its input."""
    if name not in tiny.PRIORS:
        pytest.fail(f"prior '{name}' has no smallest configuration: add it to PRIORS in tests/tiny.py")
    if not tiny.takes(name, spec, num_classes):
        pytest.skip(f"{name} is not made for these codes")
    config = PRIORS[name].Config(spec=spec, num_classes=num_classes, **{**tiny.PRIORS[name], **options})
    prior = PRIORS[name](config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in prior.parameters():
            parameter += spread * torch.randn(parameter.shape, generator=generator)
    return prior.eval()


def random_codes(spec, n, seed=0):
    g = torch.Generator().manual_seed(seed)
    return tuple(torch.randint(k, (n, *shape), generator=g) for shape, k in zip(spec.shapes, spec.vocab_sizes))


def sizes_of(spec):
    return [k for n, k in zip(spec.lengths, spec.vocab_sizes) for _ in range(n)]


def all_codes(spec):
    sequences = torch.tensor(list(itertools.product(*map(range, sizes_of(spec)))))
    return spec.unflatten(sequences)


@torch.no_grad()
def joint(prior, label=None):
    """p(codes | label) of all codes as an array with one axis per code."""
    codes = all_codes(prior.spec)
    labels = None if label is None else torch.full((len(codes[0]),), label)
    return prior.log_prob(codes, labels).double().exp().numpy().reshape(sizes_of(prior.spec))


@torch.no_grad()
def null_joint(prior):
    """p(codes) of all codes under the null class."""
    codes = all_codes(prior.spec)
    classes = torch.full((len(codes[0]),), prior.num_classes)
    log_p = 0.0
    for logits, code in zip(prior.logits(codes, classes), codes):
        log_p = log_p + logits.double().log_softmax(-1).gather(-1, code.flatten(1)[..., None]).sum((1, 2))
    return log_p.exp().numpy().reshape(sizes_of(prior.spec))


def frequencies(codes, spec):
    counts = np.zeros(sizes_of(spec))
    np.add.at(counts, tuple(spec.flatten(codes).T.numpy()), 1)
    return counts / len(codes[0])


def assert_frequencies_match(codes, spec, expected):
    measured = frequencies(codes, spec)
    # five standard deviations of a binomial count, and one count for the rarest codes
    tolerance = 5 * np.sqrt(expected * (1 - expected) / NUM_SAMPLES) + 1 / NUM_SAMPLES
    assert (np.abs(measured - expected) <= tolerance).all(), np.abs((measured - expected) / tolerance).max()
    assert (measured[expected == 0] == 0).all()


def changed(p, options):
    """Temperature, top-k, top-p and min-p of one distribution, from their definitions."""
    if options.temperature == 0:
        return np.eye(len(p))[p.argmax()]
    p = p ** (1 / options.temperature)
    order = np.argsort(-p)[: options.top_k]
    kept = []
    for i in order:
        if options.top_p is not None and p[kept].sum() / p[order].sum() >= options.top_p:
            break
        kept.append(i)
    p = p * np.isin(np.arange(len(p)), kept)
    p = p * (p >= (options.min_p or 0) * p.max())
    return p / p.sum()


def scale_at(options, i, n):
    """The guidance scale of code i of n, from the definitions of the schedules."""
    if options.guidance_schedule == "linear":
        return np.linspace(1, options.guidance_scale, n)[i]
    start, end = (0, 1) if options.guidance_schedule == "constant" else options.guidance_schedule
    return options.guidance_scale if start <= i / n < end else 1.0


def sampled_joint(spec, options, conditional, unconditional=None, known=None):
    """The distribution that sampling must have: the conditionals of the joint, each changed, multiplied again."""
    sizes = sizes_of(spec)
    result = np.ones(sizes)
    for i in range(len(sizes)):
        for prefix in np.ndindex(*sizes[:i]):
            p = marginal = conditional[prefix].reshape(sizes[i], -1).sum(1)
            p = marginal / marginal.sum()
            if options.guided:
                q = unconditional[prefix].reshape(sizes[i], -1).sum(1)
                scale = scale_at(options, i, len(sizes))
                p = p**scale * (q / q.sum()) ** (1 - scale)
                p = p / p.sum()
            p = changed(p, options)
            if known is not None and known[i] is not None:
                p = np.eye(sizes[i])[known[i]]
            result[prefix] *= p.reshape(-1, *[1] * (len(sizes) - i - 1))
    return result


# --- probability ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PRIORS)
def test_every_registered_prior_has_a_tiny_configuration(name):
    assert name in tiny.PRIORS, f"prior '{name}' has no smallest configuration: add it to PRIORS in tests/tiny.py"


@pytest.mark.parametrize("num_classes", [0, 2])
@pytest.mark.parametrize("spec", [*tiny.SPECS.values(), *tiny.REAL_SPECS.values()], ids=str)
@pytest.mark.parametrize("name", PRIORS)
def test_codes_that_a_prior_is_not_made_for_are_refused_and_no_others(name, spec, num_classes):
    options = tiny.PRIORS[name]
    if tiny.takes(name, spec, num_classes):
        PRIORS[name](PRIORS[name].Config(spec=spec, num_classes=num_classes, **options))
    else:
        refusals = (
            "powers of two, got CodeSpec|num_classes must be 0, got 2|holds real numbers|codes that are real numbers"
            "|needs the class as the first level"
        )
        with pytest.raises(ValueError, match=refusals):
            PRIORS[name].Config(spec=spec, num_classes=num_classes, **options)


@pytest.mark.parametrize("num_classes", [0, 2])
@pytest.mark.parametrize("spec", tiny.SPECS)
@pytest.mark.parametrize("name", PRIORS)
def test_probabilities_sum_to_one(name, spec, num_classes):
    prior = build(name, tiny.SPECS[spec], num_classes)
    for label in range(num_classes) if num_classes else [None]:
        assert joint(prior, label).sum() == pytest.approx(1, abs=1e-5)  # float32 log-probabilities


@pytest.mark.parametrize("spec", tiny.SPECS)
@pytest.mark.parametrize("variant", [v for v in VARIANTS if v not in PRIORS])
def test_probabilities_of_variants_sum_to_one(variant, spec):
    name, options = VARIANTS[variant]
    assert joint(build(name, tiny.SPECS[spec], **options)).sum() == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("num_classes", [0, 2])
@pytest.mark.parametrize("spec", tiny.SPECS)
@pytest.mark.parametrize("name", PRIORS)
def test_sample_frequencies_match_the_probabilities(name, spec, num_classes):
    prior = build(name, tiny.SPECS[spec], num_classes)
    label = 1 if num_classes else None
    labels = torch.full((NUM_SAMPLES,), 1) if num_classes else None
    codes = prior.sample(NUM_SAMPLES, labels, generator=torch.Generator().manual_seed(0))
    prior.spec.check(codes)
    assert_frequencies_match(codes, prior.spec, joint(prior, label))


@pytest.mark.parametrize("name", LEARNABLE)
def test_a_label_changes_the_distribution(name):
    prior = build(name, tiny.SPECS["bits"], num_classes=2)
    assert np.abs(joint(prior, 0) - joint(prior, 1)).sum() > 0.05


@pytest.mark.parametrize("name", AUTOREGRESSIVE)
def test_every_code_depends_on_the_coarser_levels(name):
    prior = build(name, tiny.SPECS["levels"])
    p = joint(prior)  # axes: the coarse code, then the two fine ones
    given_coarse = p / p.sum((1, 2), keepdims=True)
    assert np.ptp(given_coarse, axis=0).max() > 0.05


# --- sampling options -----------------------------------------------------------------------------------------------

OPTIONS = {
    "cold": {"temperature": 0.5},
    "hot": {"temperature": 3.0},
    "greedy": {"temperature": 0.0},
    "top_k": {"top_k": 2},
    "top_p": {"top_p": 0.7},
    "min_p": {"min_p": 0.6},
    "all": {"temperature": 1.5, "top_k": 2, "top_p": 0.8, "min_p": 0.3},
}
GUIDANCE = {
    "constant": {"guidance_scale": 2.5},
    "unconditional": {"guidance_scale": 0.0},
    "filtered": {"guidance_scale": 3, "top_k": 2},
    "linear": {"guidance_scale": 3.0, "guidance_schedule": "linear"},
    "interval": {"guidance_scale": 3.0, "guidance_schedule": (0.3, 0.7)},
    "first": {"guidance_scale": 3.0, "guidance_schedule": (0, 0.3), "temperature": 0.7},
}


def assert_log_prob_is_that_of_the_draws(sampled, spec, expected):
    """The log-probability of every draw is that of brute force; over all codes that came up, they add up to one."""
    codes = tuple(spec.flatten(sampled.codes).T.numpy())
    np.testing.assert_allclose(sampled.log_prob.exp().numpy(), expected[codes], rtol=1e-4)  # float32 logits
    reported = np.zeros_like(expected)
    reported[codes] = sampled.log_prob.exp().numpy()
    assert reported.sum() == pytest.approx(1 - expected[reported == 0].sum(), abs=1e-4)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("spec", ["map", "levels"])
@pytest.mark.parametrize("name", AUTOREGRESSIVE)
def test_filtered_frequencies_match_brute_force(name, spec, options):
    prior = build(name, tiny.SPECS[spec])
    expected = sampled_joint(prior.spec, SamplingOptions(**OPTIONS[options]), joint(prior))
    generator = torch.Generator().manual_seed(0)
    sampled = prior.sample(NUM_SAMPLES, generator=generator, return_log_prob=True, **OPTIONS[options])
    assert_frequencies_match(sampled.codes, prior.spec, expected)
    assert_log_prob_is_that_of_the_draws(sampled, prior.spec, expected)


@pytest.mark.parametrize("options", GUIDANCE)
@pytest.mark.parametrize("spec", ["map", "levels"])
@pytest.mark.parametrize("name", AUTOREGRESSIVE)
def test_guided_frequencies_match_brute_force(name, spec, options):
    prior = build(name, tiny.SPECS[spec], num_classes=2)
    options = GUIDANCE[options]
    expected = sampled_joint(prior.spec, SamplingOptions(**options), joint(prior, 1), null_joint(prior))
    labels, generator = torch.ones(NUM_SAMPLES, dtype=torch.int64), torch.Generator().manual_seed(0)
    sampled = prior.sample(NUM_SAMPLES, labels, generator=generator, return_log_prob=True, **options)
    assert_frequencies_match(sampled.codes, prior.spec, expected)
    assert_log_prob_is_that_of_the_draws(sampled, prior.spec, expected)


@pytest.mark.parametrize("name", PRIORS)
@pytest.mark.parametrize("spec", tiny.SPECS)
def test_the_log_probability_of_a_plain_sample_is_the_priors_own(name, spec):
    prior = build(name, tiny.SPECS[spec], num_classes=2)
    labels = torch.arange(20) % 2
    if "return_log_prob" not in prior.sampling_options:
        with pytest.raises(ValueError, match=f"{type(prior).__name__} cannot honour return_log_prob; it supports"):
            prior.sample(20, labels, return_log_prob=True)
        return
    generators = [torch.Generator().manual_seed(0) for _ in range(2)]
    codes, log_prob = prior.sample(20, labels, generator=generators[0], return_log_prob=True)
    torch.testing.assert_close(log_prob, prior.log_prob(codes, labels), atol=1e-4, rtol=1e-4)
    by_code = prior.log_prob_by_code(codes, labels)
    assert [part.shape for part in by_code] == [code.shape for code in codes]
    torch.testing.assert_close(prior.spec.flatten(by_code).sum(1), log_prob, atol=1e-4, rtol=1e-4)
    plain = prior.sample(20, labels, generator=generators[1])
    assert all(a.equal(b) for a, b in zip(plain, codes))


@pytest.mark.parametrize("known", [None, [None, 1, None], [3, None, 0]], ids=str)
@pytest.mark.parametrize("temperature", [0.0, 0.5, 1.0, 3.0])
def test_independent_bits_have_the_log_probability_of_brute_force(temperature, known):
    prior, spec = build("bernoulli", tiny.SPECS["powers"]), tiny.SPECS["powers"]
    expected = sampled_joint(spec, SamplingOptions(temperature), joint(prior), known=known)
    given = known and tuple(
        spec.unflatten(torch.tensor([part] * NUM_SAMPLES))
        for part in ([code or 0 for code in known], [code is not None for code in known])
    )
    sampled = prior.sample(NUM_SAMPLES, temperature=temperature, given=given, return_log_prob=True,
                           generator=torch.Generator().manual_seed(0))  # fmt: skip
    assert_frequencies_match(sampled.codes, spec, expected)
    assert_log_prob_is_that_of_the_draws(sampled, spec, expected)  # given codes were not drawn


@pytest.mark.parametrize("option", [{"return_log_prob": True}, {"codes_callback": print}], ids=str)
def test_a_prior_that_promises_more_than_it_writes_is_told_what_is_missing(option):
    class Promising(PRIORS["rbm"]):
        sampling_options = PRIORS["rbm"].sampling_options | option.keys()

    prior = Promising(Promising.Config(spec=tiny.SPECS["bits"]))
    with pytest.raises(NotImplementedError, match=r"Promising names .* does not write _sample_by_steps"):
        prior.sample(1, **option)


class Dice(AutoregressivePrior):
    """Fair dice: the simplest distribution of many codes."""

    Config = AutoregressiveConfig

    def logits(self, codes, classes):
        return tuple(torch.zeros(len(c), c[0].numel(), k) for c, k in zip(codes, self.spec.vocab_sizes))

    def steps(self, classes):
        while True:
            yield torch.zeros(len(classes), self.spec.vocab_sizes[0])


def test_log_probabilities_of_long_sequences_are_exact_to_the_last_digit():
    prior = Dice(AutoregressiveConfig(spec=CodeSpec(((64, 64),), (10,))))
    log_prob = prior.sample(2, return_log_prob=True).log_prob
    torch.testing.assert_close(log_prob, torch.full((2,), -4096 * math.log(10)), rtol=1e-7, atol=0)


@pytest.mark.parametrize("name", AUTOREGRESSIVE)
def test_each_code_has_its_conditional_probability(name):
    spec = tiny.SPECS["levels"]
    prior, codes = build(name, spec), all_codes(spec)
    p = joint(prior)  # axes: the coarse code, then the two fine ones
    marginals = [p.sum((1, 2), keepdims=True), p.sum(2, keepdims=True), p]
    expected = np.stack([np.broadcast_to(m / n, p.shape).ravel() for m, n in zip(marginals, [1, *marginals])], axis=1)
    measured = spec.flatten(prior.log_prob_by_code(codes)).exp().detach().numpy()
    np.testing.assert_allclose(measured, expected, atol=1e-5)


@pytest.mark.parametrize("name", [n for n, kind in PRIORS.items() if kind.log_prob_by_code is Prior.log_prob_by_code])
def test_single_codes_without_a_probability_are_refused(name):
    prior = build(name, tiny.SPECS["bits"])
    with pytest.raises(ValueError, match=f"{type(prior).__name__} does not predict one code after another"):
        prior.log_prob_by_code(random_codes(prior.spec, 2))


@pytest.mark.parametrize("name", PRIORS)
@pytest.mark.parametrize("spec", tiny.SPECS)
def test_given_codes_stay_where_they_are_known(name, spec):
    prior = build(name, tiny.SPECS[spec])
    if "given" not in prior.sampling_options:
        pytest.skip(f"{name} does not complete codes")
    codes = random_codes(prior.spec, 50)
    known = tuple(torch.rand(code.shape) < 0.5 for code in codes)
    sampled = prior.sample(50, given=(codes, known), generator=torch.Generator().manual_seed(0))
    assert all(s[k].equal(c[k]) for s, c, k in zip(sampled, codes, known))
    assert any((s != c).any() for s, c in zip(sampled, codes))


@pytest.mark.parametrize("name", AUTOREGRESSIVE)
@pytest.mark.parametrize("guided", [False, True])
def test_codes_after_a_given_one_are_drawn_given_it(name, guided):
    spec = tiny.SPECS["map"]
    prior = build(name, spec, num_classes=2)
    options = SamplingOptions(guidance_scale=2.0 if guided else 1.0)
    expected = sampled_joint(spec, options, joint(prior, 0), null_joint(prior), known=[None, 2, None, 1])
    codes = torch.tensor([[0, 2], [0, 1]]).expand(NUM_SAMPLES, 2, 2)
    known = torch.tensor([[False, True], [False, True]]).expand(NUM_SAMPLES, 2, 2)
    sampled = prior.sample(
        NUM_SAMPLES,
        torch.zeros(NUM_SAMPLES, dtype=torch.int64),
        guidance_scale=options.guidance_scale,
        given=((codes,), (known,)),
        generator=torch.Generator().manual_seed(0),
        return_log_prob=True,
    )
    assert_frequencies_match(sampled.codes, spec, expected)
    assert_log_prob_is_that_of_the_draws(sampled, spec, expected)  # given codes were not drawn


@pytest.mark.parametrize("name", PRIORS)
def test_the_callback_sees_codes_arrive_in_their_order(name):
    prior = build(name, tiny.SPECS["levels"])
    fixed, known, seen = random_codes(prior.spec, 2), prior.spec.unflatten(torch.tensor([[0, 0, 1]] * 2).bool()), []
    if "codes_callback" not in prior.sampling_options:
        with pytest.raises(ValueError, match=f"{type(prior).__name__} cannot honour codes_callback; it supports"):
            prior.sample(2, codes_callback=lambda codes, arrived: None)
        return
    watch = {"codes_callback": lambda *told: seen.append(told), "generator": torch.Generator().manual_seed(0)}
    codes = prior.sample(2, given=(fixed, known), **watch)
    for so_far, arrived in seen:
        prior.spec.check(so_far)
        for level, there, final in zip(so_far, arrived, codes):
            assert level.equal(final * there)
    orders = [prior.spec.flatten(arrived)[0].tolist() for _, arrived in seen]
    if name in AUTOREGRESSIVE:
        assert orders == [[True, False, True], [True, True, True], [True, True, True]]
    assert orders[-1] == [True] * 3


@pytest.mark.parametrize("name", PRIORS)
def test_what_is_drawn_can_be_used_in_training(name):
    prior, told = build(name, tiny.SPECS["bits"]), []
    drawn = list(prior.sample(2))
    if {"return_log_prob", "codes_callback"} <= prior.sampling_options:
        codes, log_prob = prior.sample(2, return_log_prob=True, codes_callback=lambda *state: told.extend(state))
        drawn += [*codes, log_prob, *(level for levels in told for level in levels)]
    for tensor in drawn:  # inference mode's tensors cannot be saved for a backward pass, nor written to
        (tensor.float() * torch.ones(1, requires_grad=True)).sum().backward()
        tensor.zero_()


@pytest.mark.parametrize("name", PRIORS)
def test_progress_ends_at_the_total(name):
    prior, calls = build(name, tiny.SPECS["bits"]), []
    prior.sample(2, callback=lambda done, total: calls.append((done, total)))
    assert calls[-1][0] == calls[-1][1]
    if name in AUTOREGRESSIVE:
        assert calls == [(1, 4), (2, 4), (3, 4), (4, 4)]


# --- noise ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PRIORS)
def test_same_generator_gives_the_same_sample_and_leaves_the_global_one_alone(name):
    prior = build(name, tiny.SPECS["bits"])
    before = torch.get_rng_state()
    first, second = (prior.sample(20, generator=torch.Generator().manual_seed(3)) for _ in range(2))
    other = prior.sample(20, generator=torch.Generator().manual_seed(4))
    assert first[0].equal(second[0])
    assert not first[0].equal(other[0])
    assert torch.get_rng_state().equal(before)


@pytest.mark.parametrize("spec", tiny.SPECS)
@pytest.mark.parametrize("name", PRIORS)
def test_an_image_depends_on_its_own_generator_alone(name, spec):
    prior = build(name, tiny.SPECS[spec], num_classes=3)
    labels = torch.tensor([0, 1, 2, 1])
    generators = [torch.Generator().manual_seed(seed) for seed in range(4)]
    together = prior.sample(4, labels, generator=generators)
    for i in range(4):
        alone = prior.sample(1, labels[i : i + 1], generator=[torch.Generator().manual_seed(i)])
        assert all(a[0].equal(t[i]) for a, t in zip(alone, together))


@pytest.mark.parametrize("name", PRIORS)
def test_sampling_keeps_the_training_mode_and_leaves_no_gradient(name):
    prior = build(name, tiny.SPECS["bits"]).train()
    codes = prior.sample(2)
    assert prior.training
    assert not codes[0].requires_grad
    frozen = [module for module in prior.modules() if isinstance(module, torch.nn.Dropout)]
    for module in frozen:
        module.eval()
    prior.sample(2)
    assert [module for module in prior.modules() if not module.training] == frozen


@pytest.mark.parametrize("options", [{}, {"top_p": 0.9, "top_k": 2}, {"temperature": 0.0}], ids=str)
@pytest.mark.parametrize("name", [name for name in LEARNABLE if name not in tiny.REAL_PRIORS])
def test_codes_are_never_drawn_from_what_is_not_a_number(name, options):
    prior = build(name, tiny.SPECS["bits"])
    if not options.keys() <= prior.sampling_options:
        pytest.skip(f"{name} has no filters")
    with torch.no_grad():
        for parameter in prior.parameters():
            parameter.fill_(torch.nan)
    cold = name == "rbm" and options.get("temperature") == 0  # which it refuses of sound weights too
    message = "cannot honour temperature 0" if cold else "are not numbers: the weights are damaged"
    with pytest.raises(ValueError, match=message):
        prior.sample(2, **options)


@pytest.mark.parametrize("name", PRIORS)
def test_samples_are_the_same_where_torch_is_asked_for_determinism(name):
    spec = tiny.REAL_SPECS["vector"] if name in tiny.REAL_PRIORS else tiny.SPECS["powers"]
    prior = build(name, spec)
    options = {"top_p": 0.8} if "top_p" in prior.sampling_options else {}
    plain = prior.sample(50, generator=torch.Generator().manual_seed(0), **options)
    torch.use_deterministic_algorithms(True)
    try:
        determined = prior.sample(50, generator=torch.Generator().manual_seed(0), **options)
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(map(torch.equal, plain, determined))


@pytest.mark.parametrize("batch", [1, 40])
@pytest.mark.parametrize("variant", VARIANTS)
def test_samples_do_not_depend_on_the_default_type_and_device_of_new_tensors(variant, batch):
    name, options = VARIANTS[variant]
    prior = build(name, tiny.SPECS["levels"], **options)
    plain = prior.sample(batch, generator=torch.Generator().manual_seed(0))
    torch.set_default_dtype(torch.float64)
    torch.set_default_device("meta")
    try:
        changed = prior.sample(batch, generator=torch.Generator().manual_seed(0))
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(torch.float32)
    assert all(map(torch.equal, plain, changed))


# --- caches ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", [*tiny.SPECS.values(), LARGER], ids=[*tiny.SPECS, "larger"])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(
    ("dtype", "spread", "tolerance"),
    [(torch.float64, 0.4, 1e-9), (torch.float32, 0.4, 1e-4), (torch.float32, 0.2, 1e-5)],
)
@torch.no_grad()
def test_cached_logits_equal_those_of_the_full_pass_at_every_position(variant, spec, dtype, spread, tolerance):
    name, options = VARIANTS[variant]
    prior = build(name, spec, num_classes=2, spread=spread, **options).to(dtype)
    codes, classes = random_codes(spec, 3), torch.tensor([0, 1, 2])
    full = [logits for level in prior.logits(codes, classes) for logits in level.unbind(1)]
    if (variant, spec, dtype, spread) == ("pixelsnail", LARGER, torch.float32, 0.4):
        pytest.skip("logits reach hundreds, and float32's rounding more than that on some processors")
    steps, sent = prior.steps(classes), None
    for expected, code in zip(full, spec.flatten(codes).unbind(1), strict=True):
        # sums are taken in another order
        torch.testing.assert_close(steps.send(sent), expected, atol=tolerance, rtol=tolerance)
        sent = code


@pytest.mark.parametrize("scale", [1.0, 2.0])
@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_the_cached_sample_equals_that_of_a_loop_over_full_passes(variant, scale):
    name, options = VARIANTS[variant]
    prior = build(name, LARGER, num_classes=2, **options)
    labels, n = torch.tensor([0, 1, 1, 0]), 4
    sequence = torch.zeros(n, LARGER.length, dtype=torch.int64)
    uniform = ImageNoise(n, torch.Generator().manual_seed(5), torch.device("cpu")).uniform(LARGER.length)
    for i in range(LARGER.length):
        codes = LARGER.unflatten(sequence)
        both = [prior.logits(codes, classes) for classes in (labels, torch.full_like(labels, 2))]
        first, second = ([z for level in logits for z in level.unbind(1)][i] for logits in both)
        stacked = first if scale == 1 else torch.cat([first, second])
        options = SamplingOptions(top_k=3, guidance_scale=scale, guidance_schedule="linear")
        sequence[:, i] = draw(final_logits(stacked, options, i, LARGER.length), uniform[:, i])[0]
    generator = torch.Generator().manual_seed(5)
    sampled = prior.sample(n, labels, top_k=3, guidance_scale=scale, guidance_schedule="linear", generator=generator)
    assert LARGER.flatten(sampled).equal(sequence)


@pytest.mark.parametrize("spec", [CodeSpec(((4, 5),), (3,)), CodeSpec(((2, 2), (3, 3)), (3, 4))], ids=["map", "levels"])
@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_logits_see_all_codes_before_them_and_none_after(variant, spec):
    name, options = VARIANTS[variant]
    # enough layers that the receptive field covers the map: what then is unseen is a blind spot
    deep = {"num_layers": 5} if hasattr(PRIORS[name].Config, "num_layers") else {}
    prior = build(name, spec, **{**options, **deep})
    codes = random_codes(spec, 1)
    classes = torch.zeros(1, dtype=torch.int64)
    before = prior.logits(codes, classes)
    for j in range(spec.length):
        sequence, k = spec.flatten(codes).clone(), sizes_of(spec)[j]
        sequence[0, j] = (sequence[0, j] + 1) % k
        after = prior.logits(spec.unflatten(sequence), classes)
        moved = torch.cat([(a != b).any(-1)[0] for a, b in zip(after, before)])
        assert moved.tolist() == [i > j for i in range(spec.length)]


@pytest.mark.parametrize("name", AUTOREGRESSIVE)
def test_log_prob_and_samples_work_under_autocast(name):
    prior = build(name, LARGER, num_classes=2)
    labels = torch.tensor([0, 1])
    with torch.autocast("cpu", torch.bfloat16):
        codes = prior.sample(2, labels, guidance_scale=2.0)
        assert prior.log_prob(codes, labels).dtype == torch.float32


# --- layers that are more than their weights ------------------------------------------------------------------------


class Wrapped(nn.Module):
    """A layer that shows the weight of another one and computes more, as LoRA's do."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    @property
    def weight(self):
        return self.layer.weight

    @property
    def bias(self):
        return self.layer.bias

    def forward(self, *inputs):
        return more(self.layer(*inputs))


class Quantized(Wrapped):
    """Its weight is a method, as in torch.ao.nn.quantized."""

    def weight(self):
        return self.layer.weight


def more(x):
    return 1.2 * x + 0.1


def subclassed(layer):
    kind = type(layer)
    layer.__class__ = type("More", (kind,), {"forward": lambda self, *inputs: more(kind.forward(self, *inputs))})


def with_bias(layer):
    layer.bias = nn.Parameter(torch.full((len(layer.weight),), 0.3))


CHANGES = {
    "wrapped": Wrapped,
    "quantized": Quantized,
    "subclassed": subclassed,
    "with_bias": with_bias,
    "hook": lambda layer: layer.register_forward_hook(lambda layer, inputs, output: more(output)) and None,
    "pre_hook": lambda layer: layer.register_forward_pre_hook(lambda layer, x: (more(x[0]), *x[1:])) and None,
    "forward": lambda layer: setattr(layer, "forward", lambda *x: more(type(layer).forward(layer, *x))),
}


def change_layers(prior, change, kinds=(nn.Linear, nn.Conv2d), only=None):
    """`change` gives what takes a layer's place, or None where it changed the layer itself; all layers, or `only` one.

    Returns the number of layers of these kinds.
    """
    layers = [
        (parent, name, layer)
        for parent in prior.modules()
        for name, layer in parent.named_children()
        if isinstance(layer, kinds)
    ]
    for parent, name, layer in layers if only is None else [layers[only]]:
        setattr(parent, name, change(layer) or layer)
    return len(layers)


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", AUTOREGRESSIVE)
@torch.no_grad()
def test_samples_come_from_what_layers_compute_and_not_from_their_weights_alone(name, change):
    prior = build(name, LARGER, num_classes=2)
    codes, labels = random_codes(LARGER, 4), torch.tensor([0, 1, 1, 0])
    before = prior.log_prob(codes, labels)
    change_layers(prior, CHANGES[change])
    assert (prior.log_prob(codes, labels) - before).abs().min() > 1e-3
    sampled = prior.sample(4, labels, generator=torch.Generator().manual_seed(0), return_log_prob=True)
    # float32 sums in another order
    torch.testing.assert_close(sampled.log_prob, prior.log_prob(sampled.codes, labels), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("change", ["wrapped", "hook"])
@pytest.mark.parametrize("name", AUTOREGRESSIVE)
@torch.no_grad()
def test_each_layer_alone_may_compute_more_than_its_weight_tells(name, change):
    kinds = (nn.Linear, nn.Conv2d, nn.Embedding)
    codes, labels = random_codes(LARGER, 4), torch.tensor([0, 1, 1, 0])
    plain = build(name, LARGER, num_classes=2)
    before = plain.log_prob(codes, labels)
    for only in range(change_layers(plain, lambda layer: None, kinds)):
        prior = copy.deepcopy(plain)
        change_layers(prior, CHANGES[change], kinds, only)
        assert (prior.log_prob(codes, labels) - before).abs().max() > 1e-6, (only, prior)
        sampled = prior.sample(4, labels, generator=torch.Generator().manual_seed(0), return_log_prob=True)
        torch.testing.assert_close(sampled.log_prob, prior.log_prob(sampled.codes, labels), atol=1e-4, rtol=1e-4)


def test_a_pruned_layer_trains_for_more_than_a_step():
    prior = build("gpt", LARGER).train()
    prune.l1_unstructured(prior.lm_head, "weight", 0.5)
    for _ in range(2):
        prior(random_codes(LARGER, 4))["nll"].backward()
    assert prior.lm_head.weight_orig.grad.any()


@pytest.mark.parametrize("name", AUTOREGRESSIVE)
@torch.no_grad()
def test_hooks_of_what_holds_layers_reach_the_samples(name):
    prior, labels = build(name, LARGER, num_classes=2), torch.tensor([0, 1, 1, 0])
    for module in prior.modules():
        if isinstance(module, (Attention, CausalAttention, GatedPixelCNN)):
            module.register_forward_hook(lambda module, inputs, output: more(output))
    sampled = prior.sample(4, labels, generator=torch.Generator().manual_seed(0), return_log_prob=True)
    torch.testing.assert_close(sampled.log_prob, prior.log_prob(sampled.codes, labels), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["gpt", "pixelcnn", "pixelsnail"])  # those that read weights while sampling
@torch.no_grad()
def test_parametrized_layers_are_as_they_were_built(name):
    prior = build(name, LARGER)
    change_layers(prior, lambda layer: weight_norm(layer) and None)
    for parameter in prior.parameters():
        parameter *= 1.2
    assert structure(*([prior.model, prior.lm_head] if name == "gpt" else prior.networks)) == prior.built
    sampled = prior.sample(4, generator=torch.Generator().manual_seed(0), return_log_prob=True)
    torch.testing.assert_close(sampled.log_prob, prior.log_prob(sampled.codes), atol=1e-4, rtol=1e-4)


# --- training -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", ["map", "bits"])
@pytest.mark.parametrize("name", LEARNABLE)
def test_a_few_steps_beat_uniform(name, spec):
    prior = build(name, tiny.SPECS[spec]).train()
    spec = prior.spec
    codes = tuple((code * (torch.rand(code.shape) < 0.3)) for code in random_codes(spec, 256))  # mostly 0
    optimizer = torch.optim.Adam(prior.parameters(), lr=0.02)
    for _ in range(30):
        optimizer.zero_grad()
        sum(prior(codes).values()).backward()
        optimizer.step()
    nats = -prior.eval().log_prob(codes).mean().item()
    assert nats < 0.9 * spec.max_nats


@pytest.mark.parametrize("variant", [*VARIANTS, *(n for n in LEARNABLE if n not in VARIANTS)])
def test_every_parameter_receives_a_gradient(variant):
    name, options = VARIANTS.get(variant, (variant, {}))
    prior = build(name, CodeSpec(((2, 2), (4, 4)), (3, 4)), num_classes=2, **options).train()
    sum(prior(random_codes(prior.spec, 16), torch.arange(16) % 2).values()).backward()
    missing = [n for n, p in prior.named_parameters() if p.grad is None or not p.grad.any()]
    assert missing == []


@pytest.mark.parametrize("name", LEARNABLE)
def test_training_mode_does_not_drop_the_condition_from_log_prob(name):
    prior = build(name, tiny.SPECS["bits"], num_classes=2)
    if name in AUTOREGRESSIVE:
        prior = build(name, tiny.SPECS["bits"], num_classes=2, class_dropout=0.9)
    codes, labels = random_codes(prior.spec, 32), torch.arange(32) % 2
    assert prior.train().log_prob(codes, labels).equal(prior.eval().log_prob(codes, labels))


@pytest.mark.parametrize("name", AUTOREGRESSIVE)
def test_training_drops_labels_as_often_as_asked(name):
    prior = build(name, tiny.SPECS["bits"], num_classes=2, class_dropout=0.25)
    codes = tuple(code[:1].expand(8000, -1) for code in random_codes(prior.spec, 1))
    labels = torch.zeros(8000, dtype=torch.int64)
    with torch.no_grad():
        with_label, mixed = prior(codes, labels)["nll"], prior.train()(codes, labels)["nll"]
        first = tuple(code[:1] for code in codes)
        log_p = prior._log_prob(first, torch.tensor([prior.num_classes]))
    without = -log_p[0] / prior.spec.length
    # a binomial fraction: five standard deviations of sqrt(0.25 * 0.75 / 8000)
    assert ((mixed - with_label) / (without - with_label)).item() == pytest.approx(0.25, abs=0.025)


@pytest.mark.parametrize("name", PRIORS)
def test_the_loss_is_nats_per_code(name):
    prior = build(name, tiny.SPECS["levels"], num_classes=2)
    if type(prior).forward is not AutoregressivePrior.forward and name != "uniform":
        pytest.skip(f"{name} is not trained by likelihood")
    codes, labels = random_codes(prior.spec, 8), torch.arange(8) % 2
    expected = -prior.log_prob(codes, labels).mean() / 3
    torch.testing.assert_close(prior(codes, labels), {"nll": expected})


@pytest.mark.parametrize("name", [n for n, kind in PRIORS.items() if hasattr(kind.Config, "dropout")])
def test_dropout_acts_in_training_only(name):
    prior = build(name, tiny.SPECS["bits"], dropout=0.5)
    codes = random_codes(prior.spec, 8)
    assert prior.log_prob(codes).equal(prior.log_prob(codes))
    prior.train()
    assert not prior.log_prob(codes).equal(prior.log_prob(codes))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:The .grad attribute")  # of torch's own compiler
@pytest.mark.parametrize("condition", [{}, {"num_classes": 2}, {"text_vocab_size": 3, "max_text_length": 2}], ids=str)
def test_a_training_step_of_gpt_is_one_graph_for_torch_compile(condition):
    prior = build("gpt", tiny.SPECS["levels"], **condition).train()
    codes = random_codes(prior.spec, 2)
    labels = torch.tensor([[2, -1], [-1, -1]]) if prior.conditional_on_text else torch.tensor([0, 1])
    inputs = (codes, labels) if condition else (codes,)
    torch._dynamo.reset()
    compiled = torch.compile(prior, backend="aot_eager", fullgraph=True)
    losses = []
    for model in (prior, compiled):
        torch.manual_seed(0)  # of the labels that are dropped
        losses.append(model(*inputs)["nll"])
        losses[-1].backward()
    assert torch.equal(*losses)


# --- errors ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PRIORS)
def test_wrong_labels_and_codes_are_refused(name):
    plain, conditional = build(name, tiny.SPECS["bits"]), build(name, tiny.SPECS["bits"], num_classes=2)
    codes = random_codes(plain.spec, 2)
    for call in (lambda p, labels: p.sample(2, labels), lambda p, labels: p.log_prob(codes, labels)):
        with pytest.raises(ValueError, match="conditional on 2 classes: give labels"):
            call(conditional, None)
        with pytest.raises(ValueError, match="unconditional"):
            call(plain, torch.tensor([0, 1]))
        with pytest.raises(ValueError, match=r"lie in \[0, 2\), got values from 0 to 2"):
            call(conditional, torch.tensor([0, 2]))
        with pytest.raises(ValueError, match=r"int64 of shape \(2,\), got torch.int64 of shape \(3,\)"):
            call(conditional, torch.tensor([0, 1, 1]))
        with pytest.raises(ValueError, match=r"labels must be an int64 tensor, got list: wrap them in torch.tensor"):
            call(conditional, [0, 1])
    with pytest.raises(ValueError, match=r"level 0 .* lie in \[0, 2\), got values from 2 to 2"):
        plain.log_prob((torch.full((1, 4), 2),))
    with pytest.raises(ValueError, match=r"int64 of shape \(batch, 4\), got torch.int64 of shape \(1, 5\)"):
        plain(random_codes(CodeSpec(((5,),), (2,)), 1))
    with pytest.raises(ValueError, match="got codes of 2 levels, this code space has 1"):
        plain.log_prob(codes * 2)


def test_sizes_may_be_integers_of_any_kind():
    spec = CodeSpec((np.array([2, 3]), (np.int32(4),)), (np.int64(5), 6))
    assert spec == CodeSpec(((2, 3), (4,)), (5, 6))
    assert {type(size) for shape in spec.shapes for size in shape} == {type(spec.vocab_sizes[0])} == {int}
    assert SamplingOptions(top_k=np.int64(3)).top_k == 3
    for shapes, vocab_sizes in (((8, 8), (512,)), (((8, 8),), 512)):
        with pytest.raises(ValueError, match="one shape and one vocabulary size per level"):
            CodeSpec(shapes, vocab_sizes)


def test_levels_of_different_batch_sizes_are_refused():
    with pytest.raises(ValueError, match=r"same number of images, got \[2, 3\]"):
        CodeSpec(((1,), (1,)), (2, 2)).check((torch.zeros(2, 1).long(), torch.zeros(3, 1).long()))


@pytest.mark.parametrize("name", PRIORS)
def test_guidance_needs_classes(name):
    with pytest.raises(ValueError, match=r"guidance_scale"):
        build(name, tiny.SPECS["bits"]).sample(1, guidance_scale=2.0)


@pytest.mark.parametrize("name", AUTOREGRESSIVE)
def test_guidance_needs_class_dropout(name):
    prior = build(name, tiny.SPECS["bits"], num_classes=2, class_dropout=0.0)
    with pytest.raises(ValueError, match=r"guidance_scale = 2.0 .* trained without class dropout"):
        prior.sample(1, torch.tensor([0]), guidance_scale=2.0)


@pytest.mark.parametrize("wrong", [np.zeros((2, 4), np.int64), [[0] * 4] * 2])
def test_codes_are_tensors(wrong):
    with pytest.raises(ValueError, match=f"level 0 of the codes must be a tensor, got {type(wrong).__name__}"):
        build("gpt", tiny.SPECS["bits"]).log_prob((wrong,))


def test_options_are_numbers_of_any_kind():
    prior = build("gpt", tiny.SPECS["bits"], num_classes=2)
    draws = [
        prior.sample(
            8, torch.zeros(8).long(), temperature=kind("0.5"), top_p=kind("0.75"), min_p=kind("0.125"),
            guidance_scale=kind("2"), generator=torch.Generator().manual_seed(0),
        )[0]
        for kind in (float, Fraction, np.float32)
    ]  # fmt: skip
    assert all(torch.equal(drawn, draws[0]) for drawn in draws[1:])


def test_given_codes_must_fit():
    prior = build("gpt", tiny.SPECS["bits"])
    codes, known = (torch.zeros(2, 4, dtype=torch.int64),), (torch.ones(2, 4, dtype=torch.bool),)
    with pytest.raises(ValueError, match="given holds 2 images, num_samples is 3"):
        prior.sample(3, given=(codes, known))
    with pytest.raises(ValueError, match=r"one boolean mask per level, .*got \[\(2, 3\)\]"):
        prior.sample(2, given=(codes, (known[0][:, :3],)))
    for given, message in (
        ((codes,), "given must be a pair: .*got tuple of 1"),
        (codes[0], "given must be a pair: .*got Tensor"),
        (((codes[0].numpy(),), known), "level 0 of the codes must be a tensor, got ndarray"),
        ((codes, (known[0].numpy(),)), "one boolean mask per level, each a tensor"),
        ((codes, known[0]), "one boolean mask per level, each a tensor"),
    ):
        with pytest.raises(ValueError, match=message):
            prior.sample(2, given=given)
    with pytest.raises(ValueError, match="num_samples must be at least 1, got 0"):
        prior.sample(0)
    for num_samples in (2.0, "2", None):
        with pytest.raises(ValueError, match=f"num_samples must be an integer, got {num_samples!r}"):
            prior.sample(num_samples)
    with pytest.raises(ValueError, match=r"generator must be a torch.Generator or a list of them, got \[0, 1\]"):
        prior.sample(2, generator=[0, 1])


@pytest.mark.parametrize(
    ("config", "option", "message"),
    [
        (PixelCNNConfig, {"num_classes": -1}, "num_classes must be at least 0 .*got -1"),
        (PixelCNNConfig, {"kernel_size": 4}, "kernel_size must be odd and at least 3, got 4"),
        (PixelCNNConfig, {"num_layers": 0}, "num_layers must be at least 1, got 0"),
        (PixelCNNConfig, {"num_condition_blocks": -1}, "num_condition_blocks must be at least 0, got -1"),
        (PixelCNNConfig, {"dropout": 1.0}, r"dropout is a probability in \[0, 1\), got 1.0"),
        (PixelCNNConfig, {"class_dropout": -0.1}, r"class_dropout is a probability in \[0, 1\), got -0.1"),
        (PixelCNNConfig, {"spec": CodeSpec(((2, 2, 2),), (2,))}, r"map \(h, w\) or a vector \(N,\), got .*2, 2, 2"),
        (PixelSNAILConfig, {"num_blocks": 0}, "num_blocks must be at least 1, got 0"),
        (PixelSNAILConfig, {"kernel_size": 1}, "kernel_size must be odd and at least 3, got 1"),
        (PixelSNAILConfig, {"num_heads": 3}, "attention_dim must be a multiple of num_heads = 3, got 64"),
        (
            GPTConfig,
            {"num_heads": 5, "positions": "rotary"},
            "multiple of 10 for num_heads = 5 and positions = 'rotary', got 128",
        ),
        (GPTConfig, {"positions": "rope"}, "unknown positions 'rope'; choose from rotary, rotary_2d, learned"),
        (GPTConfig, {"spec": CodeSpec(((2, 2, 2),), (2,)), "positions": "rotary_2d"}, "rotary_2d needs maps"),
    ],
)
def test_configurations_out_of_range_are_refused(config, option, message):
    with pytest.raises(ValueError, match=message):
        config(**{"spec": tiny.SPECS["map"], **option})


# --- uniform --------------------------------------------------------------------------------------------------------


def test_uniform_pays_the_maximum_and_refuses_to_choose_between_ties():
    spec = CodeSpec(((2,), (3,)), (4, 2))
    prior = Uniform(PriorConfig(spec=spec))
    assert prior.log_prob(random_codes(spec, 2)).tolist() == pytest.approx([-7 * np.log(2)] * 2)
    for option in ({"top_k": 2}, {"top_p": 0.5}):
        with pytest.raises(ValueError, match=f"Uniform cannot honour {next(iter(option))}; it supports .*temperature"):
            prior.sample(1, **option)
    with pytest.raises(ValueError, match="cannot honour temperature 0"):
        prior.sample(1, temperature=0.0)


@pytest.mark.parametrize("num_bits", [24, 30, 62])
def test_uniform_draws_every_bit_of_large_codes(num_bits):
    spec = CodeSpec(((4,), (2, 2)), (2**num_bits, 3))
    large, small = Uniform(PriorConfig(spec=spec)).sample(500, generator=torch.Generator().manual_seed(0))
    bits = large[..., None] >> torch.arange(num_bits) & 1
    mean = bits.double().mean(dim=(0, 1))
    assert ((mean - 0.5).abs() < 5 * 0.5 / math.sqrt(large.numel())).all()
    assert large.max() < 2**num_bits
    assert set(small.unique().tolist()) == {0, 1, 2}


def test_uniform_stays_uniform_under_temperature_and_guidance():
    prior = Uniform(PriorConfig(spec=tiny.SPECS["bits"], num_classes=2))
    labels = torch.zeros(NUM_SAMPLES, dtype=torch.int64)
    generator = torch.Generator().manual_seed(0)
    codes = prior.sample(
        NUM_SAMPLES, labels, temperature=0.3, min_p=0.9, guidance_scale=4.0, guidance_schedule="linear",
        generator=generator,
    )  # fmt: skip
    assert_frequencies_match(codes, prior.spec, np.full((2, 2, 2, 2), 1 / 16))


# --- PixelCNN, PixelSNAIL and GPT ------------------------------------------------------------------------------------


def test_a_pixelcnn_knows_equal_shapes_apart():
    # residual quantizers give several levels of one shape
    prior = build("pixelcnn", CodeSpec(((2, 2),) * 3, (3,) * 3))
    assert isinstance(prior, PixelCNN)
    assert [len(condition.code_embeddings) for condition in prior.conditions] == [0, 1, 2]


@torch.no_grad()
def test_pixelsnail_attends_to_the_codes_before_and_to_nothing():
    attention = CausalAttention(dim=6, attention_dim=4, num_heads=2)
    x, codes = torch.randn(2, 1, 6, 2, 3)
    place = background(x)
    queries = attention.query(torch.cat([x, place], 1)).flatten(2)[0].double().numpy().reshape(2, 2, 6)
    keys_values = attention.key_value(torch.cat([x, codes, place], 1)).flatten(2)[0].double().numpy()
    keys, values = (part.reshape(2, 2, 6) for part in np.split(keys_values, 2))
    expected = np.zeros((2, 2, 6))  # heads, channels, positions
    for head, i in np.ndindex(2, 6):
        weights = np.exp([queries[head, :, i] @ keys[head, :, j] / np.sqrt(2) for j in range(i)])
        for weight, j in zip(weights / (1 + weights.sum()), range(i)):  # 1: the zero key
            expected[head, :, i] += weight * values[head, :, j]
    np.testing.assert_allclose(attention(x, place, codes)[0].flatten(1).numpy(), expected.reshape(4, 6), atol=1e-6)


@torch.no_grad()
def test_sampling_from_pixelsnail_computes_each_position_once():
    prior, computed = build("pixelsnail", LARGER), {}
    for name, module in prior.networks.named_modules():
        if isinstance(module, CausalConv):
            module.register_forward_hook(
                lambda module, inputs, output, name=name: computed.update(
                    {name: computed.get(name, 0) + output[0, 0].numel()}
                )
            )
    for network, size in zip(prior.networks, prior.sizes):  # `sample` would heed the hooks, and take whole passes
        steps, sent = network.steps(torch.zeros(2, prior.config.hidden_dim, *size)), None
        for _ in range(math.prod(size)):
            steps.send(sent)
            sent = torch.zeros(2, dtype=torch.int64)
    assert {name: n for name, n in computed.items() if n != LARGER.lengths[int(name[0])]} == {}
    assert len(computed) == 3 * 2 * 2 * 2  # levels, blocks, residual layers, convolutions


@pytest.mark.parametrize("positions", ["rotary", "rotary_2d", "learned"])
@torch.no_grad()
def test_gpt_knows_the_order_of_codes(positions):
    prior = build("gpt", CodeSpec(((2, 3),), (5,)), positions=positions)
    classes = torch.zeros(1, dtype=torch.int64)
    one, other = (torch.tensor([[[1, 3, 2], [0, 4, 4]]]), torch.tensor([[[3, 1, 2], [0, 4, 4]]]))
    difference = prior.logits((one,), classes)[0] - prior.logits((other,), classes)[0]
    assert difference[0, -1].abs().max() > 1e-3


def test_rotated_products_depend_on_the_difference_of_places_alone():
    query, key = torch.randn(2, 1, 1, 1, 8)

    def product(place, other):
        tables = [rotary_angles(torch.tensor([p]), 4, 100.0) for p in (place, other)]
        rotated = [rotate(x, torch.stack([t.cos(), t.sin()])) for x, t in zip((query, key), tables)]
        return (rotated[0] * rotated[1]).sum()

    torch.testing.assert_close(product(3, 1), product(10, 8))
    assert (product(3, 1) - product(3, 2)).abs() > 1e-3


def test_half_of_a_head_turns_with_the_row_and_half_with_the_column():
    config = GPTConfig(spec=CodeSpec(((3, 4),), (2,)), positions="rotary_2d", hidden_dim=16, num_heads=2)
    cos = rotary_table(config, torch.device("cpu"))[0].unflatten(0, (3, 4))  # (rows, columns, head_dim / 2)
    by_row, by_column = cos.chunk(2, dim=-1)
    assert by_row.equal(by_row[:, :1].expand_as(by_row))
    assert by_column.equal(by_column[:1].expand_as(by_column))
    assert len(by_row[:, 0].unique(dim=0)) == 3
    assert len(by_column[0].unique(dim=0)) == 4


def test_levels_share_one_scale_of_coordinates():
    rows, columns = coordinates(CodeSpec(((1, 1), (2, 2), (2, 4)), (2, 2, 2)), torch.device("cpu"))
    assert rows.tolist() == [0.5, 0, 0, 1, 1, 0, 0, 0, 0, 1, 1, 1, 1]
    assert columns.tolist() == [1.5, 0.5, 2.5, 0.5, 2.5, 0, 1, 2, 3, 0, 1, 2, 3]


@pytest.mark.parametrize("theta", [10_000.0, 50.0])
@torch.no_grad()
def test_gpt_and_llama_load_each_others_weights_and_agree(theta):
    ensure_torchvision()
    from transformers import LlamaConfig, LlamaForCausalLM

    prior = build("gpt", LARGER, num_classes=3, positions="rotary", rope_theta=theta)
    llama = LlamaForCausalLM(LlamaConfig(**prior.llama_config())).eval()
    codes, classes = random_codes(LARGER, 2), torch.tensor([1, 3])

    def assert_equal_logits(prior, llama):
        parts = [c.flatten(1) + offset for c, offset in zip(codes, (0, 5, 12))]
        tokens = torch.cat([14 + classes[:, None], *parts], dim=1)
        theirs = llama(input_ids=tokens).logits[:, :-1].split(LARGER.lengths, dim=1)
        theirs = [z[..., start:stop] for z, start, stop in zip(theirs, (0, 5, 12), (5, 12, 14))]
        torch.testing.assert_close(list(prior.logits(codes, classes)), theirs, atol=1e-4, rtol=1e-4)

    llama.load_state_dict(prior.state_dict())
    assert_equal_logits(prior, llama)
    other = LlamaForCausalLM(llama.config).eval()
    for parameter in other.parameters():
        parameter += 0.2 * torch.randn_like(parameter)
    prior.load_state_dict(other.state_dict())
    assert_equal_logits(prior, other)


def test_llama_has_no_other_positions():
    with pytest.raises(ValueError, match="rotary positions only, this prior has positions = 'learned'"):
        build("gpt", LARGER, positions="learned").llama_config()


def test_guarding_torchvision_twice_is_harmless():
    ensure_torchvision()
    ensure_torchvision()
    import torchvision

    assert torchvision.ops.box_iou(torch.tensor([[0.0, 0, 1, 1]]), torch.tensor([[0.0, 0, 1, 1]])).item() == 1
