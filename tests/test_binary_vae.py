"""Binary VAEs against enumeration and quadrature on models of a few bits."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from tests import tiny
from tokenizer import TOKENIZERS
from tokenizer.binary_vae import BinaryVAE, entropy, log_bernoulli
from tokenizer.dvaesharp import unnormalized_log_marginal
from tokenizer.gaussian_integral import relax_normal, unnormalized_log_density
from tokenizer.gumbolt import relax_concrete
from tokenizer.latent_networks import LocalGroup
from tokenizer.latent_vae import balanced_kl, importance_weighted
from tokenizer.score_function import leave_one_out_signal
from tokenizer.smoothing import SMOOTHINGS

BINARY = sorted(name for name, cls in TOKENIZERS.items() if issubclass(cls, BinaryVAE))
MLP = {"type": "mlp", "hidden_dim": 6, "num_layers": 1}
NODES = 48  # of Gauss-Legendre quadrature per latent


def make(name: str, spread: float = 0.7, **options) -> BinaryVAE:
    """A model in float64 whose every weight matters, in evaluation mode for its batch norm alone."""
    torch.manual_seed(0)
    config = {
        **tiny.TOKENIZERS[name],
        "image_shape": (1, 2, 2),
        "bits_per_group": 2,
        "network": MLP,
        "weight_decay": 0.0,
        **options,
    }
    model = TOKENIZERS[name](TOKENIZERS[name].Config(**config)).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += spread * torch.randn_like(parameter)
    return model


def states(num_bits: int) -> torch.Tensor:
    return torch.tensor(list(itertools.product((0.0, 1.0), repeat=num_bits)), dtype=torch.float64)


def image(seed: int = 0) -> torch.Tensor:
    return (torch.rand(1, 1, 2, 2, generator=torch.Generator().manual_seed(seed)) < 0.5).double()


def exact_log_partition(prior) -> torch.Tensor:
    """Differentiable, over all states."""
    z = states(prior.num_bits)
    return (-prior.energy(*z.split([prior.num_left, prior.num_right], dim=1))).logsumexp(dim=0)


def grid(dims: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Points (M, dims) of [0, 1]^dims and log weights (M,)."""
    nodes, weights = (torch.from_numpy(part) for part in __import__("numpy").polynomial.legendre.leggauss(NODES))
    points = torch.cartesian_prod(*[(nodes + 1) / 2] * dims).reshape(-1, dims)
    return points, torch.cartesian_prod(*[weights / 2] * dims).reshape(-1, dims).log().sum(dim=1)


def gradients(scalar: torch.Tensor, model: BinaryVAE) -> dict[str, torch.Tensor]:
    named = {n: p for n, p in model.named_parameters() if n.startswith(("network.encoders", "prior"))}
    found = torch.autograd.grad(scalar, list(named.values()), allow_unused=True)
    return {name: torch.zeros_like(p) if g is None else g for (name, p), g in zip(named.items(), found)}


# The KL term of z and zeta together, of two groups of two bits


def exact_joint_kl(model: BinaryVAE, x: torch.Tensor, conditional) -> torch.Tensor:
    """KL(q(z, zeta | x) || p(z, zeta)) by summing over z and integrating over zeta of the first group.

    `conditional(zeta, bits)` is the log density of zeta given bits, with zeta on the grid (M, 2).
    """
    features = model.features(x)
    first = model.network.infer(features, 0, [])
    total = -entropy(first).sum()
    for bits in states(2):
        probability = log_bernoulli(first, bits[None]).exp()
        points, log_weights = conditional(bits)
        repeated = [f.expand(len(points), -1) for f in features]
        second = model.network.infer(repeated, 1, [points])
        energies = 0.0
        for others in states(2):
            energy = model.prior.energy(bits[None], others[None])
            energies = energies + log_bernoulli(second, others.expand(len(points), -1)).exp() * energy
        total = total + probability[0] * (log_weights.exp() * (energies - entropy(second).sum(dim=1))).sum()
    return total + exact_log_partition(model.prior)


def exponential_grid(beta: float):
    points, log_weights = grid(2)

    def conditional(bits):
        distance = torch.where(bits.bool(), 1 - points, points)
        log_density = math.log(beta / (1 - math.exp(-beta))) - beta * distance
        return points, log_weights + log_density.sum(dim=1)

    return conditional


def spike_grid(beta: float):
    """zeta = 0 for a bit of 0; beta e^(beta zeta) / (e^beta - 1) for a bit of 1."""

    def conditional(bits):
        points, log_weights = grid(2)
        log_density = math.log(beta / math.expm1(beta)) + beta * points
        free = bits.bool()
        weights = torch.where(free, log_density, 0.0).sum(dim=1) + log_weights
        return torch.where(free, points, 0.0), weights

    return conditional


@pytest.mark.parametrize(
    ("name", "options", "conditional"),
    [
        ("dvaepp", {"smoothing": {"type": "exponential", "beta": 4.0}}, exponential_grid(4.0)),
        ("dvae", {"beta": 3.0}, spike_grid(3.0)),
    ],
)
def test_the_kl_gradient_is_that_of_the_exact_joint_kl(name, options, conditional):
    model, x = make(name, **options), image()
    with torch.no_grad():  # so strong that no part of the gradient hides in the noise
        model.prior.weight *= 5
        model.network.encoders[1][0].weight *= 4
    exact = exact_joint_kl(model, x, conditional)
    expected = gradients(exact, model)
    draws = 16_000
    sums = {key: torch.zeros_like(value) for key, value in expected.items()}
    squares, values = dict(sums), []
    model.prior.log_partition_loss = lambda: exact_log_partition(model.prior)
    chunk = 80
    for _ in range(draws // chunk):
        losses, _, _ = model.bound(x.expand(chunk, -1, -1, -1), 1.0)
        values.append((losses["kl_minus_log_partition"] + losses["log_partition"]).item())
        for key, value in gradients(losses["kl_minus_log_partition"] + losses["log_partition"], model).items():
            sums[key] = sums[key] + value
            squares[key] = squares[key] + value**2
    n = draws // chunk
    if name == "dvaepp":  # DVAE's value means nothing
        spread = torch.tensor(values).std() / math.sqrt(n)
        assert abs(sum(values) / n - exact.item()) < 4 * spread + 1e-9
    for key, value in expected.items():
        mean = sums[key] / n
        error = ((squares[key] / n - mean**2).clamp(min=0) / n).sqrt()
        assert ((mean - value).abs() <= 4.5 * error + 1e-6).all(), key


def test_the_pull_of_the_prior_is_float32_also_under_autocast():
    model = make("dvae", num_groups=2, bits_per_group=4).float()  # which autocast would round
    posterior, _ = model.training_pass(image().float().expand(4, -1, -1, -1), lambda x: (x, model.relax(x), None))
    found = []
    for inside in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=inside):
            loss = model.kl_surrogate(posterior)
        found.append(torch.autograd.grad(loss, posterior.logits, retain_graph=True)[0])
    assert torch.equal(*found)


def test_dvae_moves_only_draws_at_zero():
    """Where the right side follows zeta of the left one closely: what is lost by taking all draws is large here."""
    model = make("dvae", num_groups=2, bits_per_group=2, beta=3.0)
    first = torch.tensor([[0.4, -0.3]], dtype=torch.float64, requires_grad=True)
    with torch.no_grad():
        model.prior.weight.copy_(torch.tensor([[3.0, 0.0], [0.0, -2.0]]))

    def infer(features, group, before):
        return first.expand(len(features[0]), -1) if group == 0 else 6 * before[0] - 3

    model.network.infer = infer
    exact = exact_joint_kl(model, image(), spike_grid(3.0))
    (expected,) = torch.autograd.grad(exact, first)
    torch.manual_seed(0)
    draws = []
    for _ in range(200):
        losses, _, _ = model.bound(image().expand(100, -1, -1, -1), 1.0)
        draws.append(torch.autograd.grad(losses["kl_minus_log_partition"], first)[0])
    draws = torch.stack(draws)
    error = draws.std(dim=0) / math.sqrt(len(draws))
    assert ((draws.mean(dim=0) - expected).abs() < 4.5 * error).all()


def test_one_group_has_an_analytic_kl():
    for name in ("dvaepp", "dvae"):
        model, x = make(name, num_groups=1, bits_per_group=4), image()
        model.prior.log_partition_loss = lambda prior=model.prior: exact_log_partition(prior)
        losses, posterior, _ = model.bound(x, 1.0)
        z = states(4)
        log_q = log_bernoulli(posterior.logits.expand(16, -1), z)
        log_p = -model.prior.energy(z[:, :2], z[:, 2:]) - exact_log_partition(model.prior)
        exact = (log_q.exp() * (log_q - log_p)).sum()
        torch.testing.assert_close(losses["kl_minus_log_partition"] + losses["log_partition"], exact)


# Marginal densities of relaxed latents


@pytest.mark.parametrize("kind", ["exponential", "uniform_exponential", "gaussian"])
@pytest.mark.parametrize("prior", ["rbm", "bernoulli"])
def test_mean_field_is_a_lower_bound_close_to_the_sum(prior, kind):
    model = make("dvaesharp", prior={"type": prior}, num_groups=1, bits_per_group=6)
    torch.manual_seed(1)
    ratio = SMOOTHINGS[kind]().relax(torch.randn(200, 6, dtype=torch.float64)).log_ratio
    z = states(6)
    energies = model.prior.energy(z[:, :3], z[:, 3:])
    exact = (ratio @ z.T - energies).logsumexp(dim=1)
    bound = unnormalized_log_marginal(model.prior, ratio)
    assert (bound <= exact + 1e-9).all()
    assert (exact - bound).mean() < (1e-9 if prior == "bernoulli" else 0.05)


def test_the_gradient_of_mean_field_holds_the_means_constant():
    model = make("dvaesharp", num_groups=1, bits_per_group=4)
    ratio = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(unnormalized_log_marginal(model.prior, ratio).sum(), ratio)
    step = torch.zeros_like(ratio)
    step[1, 2] = 1e-4
    with torch.no_grad():
        low, high = (unnormalized_log_marginal(model.prior, ratio + s * step).sum() for s in (-1, 1))
    torch.testing.assert_close(slope[1, 2], (high - low) / 2e-4, rtol=2e-2, atol=2e-3)


def test_the_joint_kl_is_never_below_the_marginal_one():
    """By quadrature over two latents, for random posteriors and machines; the difference is the price of keeping z."""
    points, log_weights = grid(2)
    beta = 5.0
    log_r0 = math.log(beta / (1 - math.exp(-beta))) - beta * points
    log_r1 = math.log(beta / (1 - math.exp(-beta))) - beta * (1 - points)
    generator = torch.Generator().manual_seed(0)
    gaps = []
    for _ in range(100):
        logits, bias = 2 * torch.randn(2, 2, generator=generator, dtype=torch.float64)
        coupling = 2 * torch.randn((), generator=generator, dtype=torch.float64)
        z = states(2)
        log_p = z @ bias + coupling * z.prod(dim=1)
        log_p = log_p - log_p.logsumexp(dim=0)
        log_q = log_bernoulli(logits.expand(4, -1), z)
        joint = (log_q.exp() * (log_q - log_p)).sum()
        log_r = torch.stack([torch.where(bits.bool(), log_r1, log_r0).sum(dim=1) for bits in z])
        q_zeta, p_zeta = ((part[:, None] + log_r).logsumexp(dim=0) for part in (log_q, log_p))
        gaps.append(joint - ((q_zeta + log_weights).exp() * (q_zeta - p_zeta)).sum())
    assert min(gaps) > -1e-6
    assert max(gaps) > 0.01


def test_the_gaussian_integral_equals_the_sum_over_states():
    model = make("gaussian_integral", num_groups=1, bits_per_group=6)
    prior, beta = model.prior, 4.0
    zeta = torch.randn(50, 6, dtype=torch.float64)
    with torch.no_grad():
        density = unnormalized_log_density(prior, zeta, beta)
        couplings = torch.zeros(6, 6, dtype=torch.float64)
        couplings[:3, 3:] = prior.weight
        couplings = couplings + couplings.T
        precision = max(beta, torch.linalg.eigvalsh(couplings).max().item() + 5)
        normal = torch.distributions.MultivariateNormal
        matrix = couplings + precision * torch.eye(6, dtype=torch.float64)
        z = states(6)
        log_r = torch.stack([normal(bits, precision_matrix=matrix).log_prob(zeta) for bits in z])
        energies = prior.energy(z[:, :3], z[:, 3:])
        torch.testing.assert_close(density, (log_r - energies[:, None]).logsumexp(dim=0))


def test_the_shifted_normal_mixture_is_a_density_with_gradients_along_its_quantiles():
    torch.manual_seed(0)
    count = 30_000
    logits = torch.tensor([-0.7, 1.2]).double().repeat(count, 1).requires_grad_()
    shift = torch.tensor([0.8, -1.5]).double().repeat(count, 1).requires_grad_()
    width = torch.tensor([0.25, 0.4]).double().repeat(count, 1).requires_grad_()
    _, zeta, log_q = relax_normal(logits, shift, width)

    def cdf(zeta, logits, shift, width):
        delta, q = (shift.sigmoid() - 0.5) / 2, logits.sigmoid()
        near, far = ((zeta - delta - z) / width for z in (0, 1))
        return (1 - q) * torch.special.ndtr(near) + q * torch.special.ndtr(far)

    # The density is the slope of the distribution, and quantiles do not move: dF = 0 along each gradient
    point = zeta.detach().requires_grad_()
    (slope,) = torch.autograd.grad(cdf(point, logits.detach(), shift.detach(), width.detach()).sum(), point)
    torch.testing.assert_close(log_q.detach(), slope.log())
    for parameter in (logits, shift, width):
        (along,) = torch.autograd.grad(zeta.sum(), parameter, retain_graph=True)
        (across,) = torch.autograd.grad(cdf(zeta.detach(), logits, shift, width).sum(), parameter)
        torch.testing.assert_close(along, -across / slope)
    rho = cdf(zeta, logits, shift, width).detach().sort(dim=0).values
    uniform = (torch.arange(count).double() + 0.5) / count
    assert ((rho - uniform[:, None]).abs().max(dim=0).values < 1.63 / math.sqrt(count)).all()


# Concrete


def test_concrete_draws_round_to_the_bit_and_its_density_integrates_to_one():
    torch.manual_seed(0)
    for temperature in (0.1, 0.5, 1.0):
        logits = torch.full((100_000,), 0.8)
        _, zeta, _ = relax_concrete(logits, temperature)
        assert abs((zeta > 0.5).float().mean() - logits[0].sigmoid()) < 0.006
    # in the logit of zeta: tau logistic(tau y - l)
    y = torch.linspace(-200, 200, 400_001, dtype=torch.float64)
    log_density = math.log(0.5) + F.logsigmoid(0.5 * y - 0.8) + F.logsigmoid(0.8 - 0.5 * y)
    assert abs(torch.trapezoid(log_density.exp(), y) - 1) < 1e-6


def test_the_energy_of_relaxed_latents_integrates_to_less_than_the_partition_function():
    """Hence GumBolt's proxy density is never above one that is normalised."""
    points, log_weights = grid(2)
    for coupling in (-4.0, -1.0, 0.0, 2.0, 8.0):
        integral = (coupling * points.prod(dim=1) + log_weights).logsumexp(dim=0)
        assert integral < (coupling * states(2).prod(dim=1)).logsumexp(dim=0)


def evidence(model, x: torch.Tensor, count: int = 4000) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean importance weight and its standard error, from the model's own many-draw objective."""
    model.prior.log_partition_loss = lambda: exact_log_partition(model.prior)
    object.__setattr__(model.config, "num_draws", count)
    with torch.no_grad():
        for encoder in model.network.encoders:  # not far from any prior, so that weights have moderate tails
            encoder[-1].weight *= 0.1
            encoder[-1].bias *= 0.1
        torch.manual_seed(0)
        images = x.expand(count, -1, -1, -1)
        means = torch.stack([torch.exp(-sum(model.bound(images, 1.0)[0].values())) for _ in range(10)])
    return means.mean(), means.std() / math.sqrt(len(means))


@pytest.mark.parametrize("name", ["concrete", "dvaesharp"])
def test_relaxed_weights_estimate_the_evidence_of_the_relaxed_model(name):
    """Whatever the encoder, the mean weight is E over zeta from the prior of p(x | zeta)."""
    options = {"temperature": 0.5} if name == "concrete" else {"smoothing": {"type": "exponential", "beta": 4.0}}
    model, x = make(name, prior={"type": "bernoulli"}, **options), image()
    with torch.no_grad():
        for bias in (model.prior.left_bias, model.prior.right_bias):
            bias += 1
    found, error = evidence(model, x)
    torch.manual_seed(1)
    logits = torch.cat([model.prior.left_bias, model.prior.right_bias]).detach().expand(20_000, -1)
    zeta = relax_concrete(logits, 0.5)[1] if name == "concrete" else model.smoothing.relax(logits).zeta
    with torch.no_grad():
        likelihood = torch.exp(-model.likelihood.nll(model.decode_latents(zeta).params, x.expand(20_000, -1, -1, -1)))
    expected, noise = likelihood.mean(), likelihood.std() / math.sqrt(20_000)
    assert abs(found - expected) < 4.5 * math.hypot(error, noise)


def test_gumbolt_without_relaxation_is_the_discrete_bound():
    model, x = make("gumbolt", temperature=1e-3), image()
    found, error = evidence(model, x)
    z = states(4)
    with torch.no_grad():
        log_joint = -model.nll(x.expand(16, -1, -1, -1), (z.long(),)) + model.prior.log_prob((z.long(),))
    assert abs(found - log_joint.exp().sum()) < 4.5 * error


# Score functions


@pytest.mark.parametrize("num_draws", [2, 3])
def test_the_vimco_gradient_has_the_exact_expectation(num_draws):
    """Over all states of all draws: E[estimator] = gradient of the expected bound."""
    torch.manual_seed(0)
    logits = torch.randn(2, dtype=torch.float64, requires_grad=True)
    log_joint = torch.randn(4, dtype=torch.float64)
    z = states(2)
    exact = expected = 0.0
    for indices in itertools.product(range(4), repeat=num_draws):
        draws = z[list(indices)]
        log_q = log_bernoulli(logits.expand(num_draws, -1), draws)
        log_weights = log_joint[list(indices)] - log_q
        bound = -importance_weighted(log_weights, num_draws)[0]
        probability = log_q.sum().exp()
        exact = exact + probability * bound
        signal = leave_one_out_signal(log_weights.detach()[None])[0]
        surrogate = bound + (signal * log_q).sum()
        expected = expected + probability.detach() * torch.autograd.grad(surrogate, logits, retain_graph=True)[0]
    torch.testing.assert_close(expected, torch.autograd.grad(exact, logits)[0], rtol=1e-10, atol=1e-12)


def test_the_vimco_signal_ignores_a_constant():
    log_weights = torch.randn(5, 4, dtype=torch.float64)
    torch.testing.assert_close(leave_one_out_signal(log_weights), leave_one_out_signal(log_weights + 123.0))


def test_the_importance_weighted_loss_does_not_depend_on_the_default_device_of_new_tensors():
    log_weights = torch.randn(8)
    plain = importance_weighted(log_weights, 4)
    torch.set_default_device("meta")
    try:
        changed = importance_weighted(log_weights, 4)
    finally:
        torch.set_default_device(None)
    assert torch.equal(plain, changed)


def test_the_importance_weighted_loss_has_the_softmax_gradient():
    log_weights = torch.randn(12, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(importance_weighted(log_weights, 4).sum(), log_weights)
    torch.testing.assert_close(slope, -log_weights.detach().unflatten(0, (3, 4)).softmax(dim=1).flatten())


@pytest.mark.parametrize("name", ["nvil", "reinforce", "vimco"])
def test_score_function_gradients_are_those_of_the_exact_bound(name):
    options = {"num_draws": 2} if name == "vimco" else {}
    model, x = make(name, num_groups=1, bits_per_group=2, **options), image()
    z = states(2)
    first = model.network.infer(model.features(x), 0, [])
    log_q = log_bernoulli(first.expand(4, -1), z)
    log_p = -model.prior.energy(z[:, :1], z[:, 1:])
    log_likelihood = -model.likelihood.nll(model.decode_latents(z).params, x.expand(4, -1, -1, -1))
    weights = log_likelihood + log_p - log_q
    if name == "vimco":
        pairs = [(i, j) for i in range(4) for j in range(4)]
        exact = sum(
            (log_q[i] + log_q[j]).exp() * (torch.logaddexp(weights[i], weights[j]) - math.log(2)) for i, j in pairs
        )
    else:
        exact = (log_q.exp() * weights).sum()
    expected = gradients(-exact, model)
    model.prior.log_partition_loss = lambda: 0.0 * model.prior.left_bias.sum()
    scale = 1 if name != "nvil" else None
    if scale is None:
        model.signal_variance.fill_(0.25)  # below 1: the signal is not scaled
    images = x.expand(2 * 20, -1, -1, -1) if name == "vimco" else x.expand(40, -1, -1, -1)
    found = {key: [] for key in expected}
    torch.manual_seed(0)
    for _ in range(300):
        losses, _, _ = model.bound(images, 1.0)
        losses.pop("baseline", None)
        for key, value in gradients(sum(losses.values()), model).items():
            found[key].append(value)
    for key, value in expected.items():
        draws = torch.stack(found[key])
        error = draws.std(dim=0) / math.sqrt(len(draws))
        assert ((draws.mean(dim=0) - value).abs() <= 4.5 * error + 1e-7).all(), key


def test_the_baseline_moves_once_per_step():
    model = make("nvil").train()
    model(image().expand(4, -1, -1, -1))
    assert model.signal_mean == 0
    model.after_step()
    first = model.signal_mean.clone()
    assert first < 0
    model.after_step()
    assert model.signal_mean == first


@pytest.mark.parametrize("name", ["nvil", "reinforce"])
def test_a_step_that_overflows_leaves_the_baseline_as_it_is(name):
    model = make(name).train()
    for scale in (1, math.inf):
        model(image().expand(4, -1, -1, -1))
        model._pending *= scale
        before = model.signal_mean.clone(), model.signal_variance.clone()
        model.after_step()
        moved = [not torch.equal(*pair) for pair in zip(before, (model.signal_mean, model.signal_variance))]
        assert moved == [scale == 1] * 2


# The discrete model, whatever trained it


@pytest.mark.parametrize("name", BINARY)
def test_the_importance_weighted_bound_approaches_the_exact_likelihood(name):
    model, x = make(name), image()
    z = states(4)
    with torch.no_grad():
        codes = (z.long(),)
        log_joint = -model.nll(x.expand(16, -1, -1, -1), codes) + model.prior.log_prob(codes)
        exact = log_joint.logsumexp(dim=0)
        torch.manual_seed(0)
        draw = model.draw_posterior(x.expand(40_000, -1, -1, -1))
        weights = draw.log_likelihood + model.prior.log_prob(draw.codes) - draw.log_q
        bounds = [weights.unflatten(0, (-1, k)).logsumexp(dim=1).sub(math.log(k)).mean() for k in (1, 10, 1000)]
        assert bounds[0] < bounds[1] < exact
        estimate = weights.exp()
        error = estimate.std() / math.sqrt(len(weights))
        assert abs(estimate.mean() - exact.exp()) < 4.5 * error


@pytest.mark.parametrize("name", BINARY)
def test_scores_are_the_parts_of_the_bound(name):
    model, x = make(name), image().expand(5, -1, -1, -1)
    scores = model.scores(x, model(x))
    torch.testing.assert_close(scores["negative_elbo"], scores["distortion"] + scores["kl"])
    torch.testing.assert_close(scores["nll"] * 4, scores["negative_elbo"])


@pytest.mark.parametrize("name", BINARY)
def test_training_raises_the_exact_likelihood_of_the_data(name):
    """Four patterns of nine pixels, six bits: exact log p(x) by enumeration, before and after a few hundred steps."""
    torch.manual_seed(0)
    config = {**tiny.TOKENIZERS[name], "image_shape": (1, 3, 3), "num_groups": 2, "bits_per_group": 3}
    model = TOKENIZERS[name](TOKENIZERS[name].Config(**{**config, "network": {**MLP, "hidden_dim": 24}}))
    data = torch.rand(4, 1, 3, 3).round()
    model.initialize(data)

    @torch.no_grad()
    def exact() -> float:
        model.eval()
        z = states(6).long()
        log_joint = [-model.nll(x.expand(64, -1, -1, -1), (z,)) + model.prior.log_prob((z,)) for x in data]
        model.train()
        return torch.stack(log_joint).logsumexp(dim=1).mean().item()

    before = exact()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    batch = data.repeat(16, 1, 1, 1)
    for _ in range(250):
        optimizer.zero_grad()
        sum(model.train()(batch).losses.values()).backward()
        optimizer.step()
        model.after_step()
    assert before < -4.5
    # log(1/4) = -1.39 is what the data allow
    assert exact() > -3.2


@pytest.mark.parametrize("name", BINARY)
def test_later_groups_know_earlier_ones_and_never_the_reverse(name):
    model, x = make(name), image()
    features = model.features(x)
    plain = model.network.infer(features, 1, [torch.zeros(1, 2, dtype=torch.float64)])
    assert not torch.equal(plain, model.network.infer(features, 1, [torch.ones(1, 2, dtype=torch.float64)]))
    model.network.encoders[1].requires_grad_(False).apply(lambda m: None)
    with torch.no_grad():
        first = model.network.infer(features, 0, [])
        before = model.infer(features, first, sample=False).latents
        for parameter in model.network.encoders[1].parameters():
            parameter += 1
        after = model.infer(features, first, sample=False).latents
    assert torch.equal(before[:, :2], after[:, :2])


def test_the_kl_weight_rises_linearly_and_is_one_without_a_step():
    model = make("dvaepp", kl_warmup_steps=10)
    assert [model.kl_weight(step) for step in (0, 4, 9, 100, None)] == [0.1, 0.5, 1.0, 1.0, 1.0]


def test_a_draw_per_image_is_repeated_in_a_row():
    model = make("dvaepp", num_draws=3).train()
    seen = []
    model.network.register_forward_pre_hook(lambda *_: None)
    features = model.features
    model.features = lambda images: seen.append(images) or features(images)
    x = torch.cat([image(0), 1 - image(0)])
    out = model(x)
    assert torch.equal(seen[0], x.repeat_interleave(3, dim=0))
    assert out.images.shape == x.shape
    assert out.codes[0].shape == (2, 4)


# Collapse


def test_what_groups_carry_is_not_lost_in_a_step_that_overflows():
    model = make("dvaepp")
    for nats in (math.nan, 2.0, math.nan, 2.0):
        model._remember({"bits": (torch.tensor(nats), 4)})
        assert model.complaints() == {}
    assert model.nats_by_group["bits"][0].item() == pytest.approx(2)
    for _ in range(400):
        model._remember({"bits": (torch.tensor(0.0), 4)})
    assert list(model.complaints()) == ["collapse of bits"]


def test_bits_that_do_not_depend_on_the_image_are_named():
    model = make("dvaepp").float().train()
    with torch.no_grad():
        for parameter in model.network.encoders[1].parameters():
            parameter.zero_()
        model.network.encoders[0][-1].weight *= 5
    x = torch.cat([image(s) for s in range(20)]).float()
    model(x)
    found = model.complaints()
    assert [name for name in found if "collapse" in name] == ["collapse of bits of group 1"]
    assert "kl_warmup_steps" in found["collapse of bits of group 1"]


def test_local_latents_may_carry_nothing_while_they_cost_more_than_the_others():
    network = {"type": "conv", "hidden_dims": (8, 8), "local_dims": (1, 1), "global_dim": 8}
    options = {"image_shape": (1, 4, 4), "network": network, "kl_warmup_steps": 10, "local_kl_start": 4.0}
    model = make("dvaepp", **options).float().train()
    with torch.no_grad():
        for name, parameter in model.network.named_parameters():
            if "posterior" in name or name.startswith("heads.1"):
                parameter.zero_()
    x = (torch.rand(20, 1, 4, 4) < 0.5).float()
    model(x, 3)
    assert model.complaints() == {}  # in the first half of the warm-up they may not have begun to learn
    model(x, 4)
    assert [*model.complaints()] == ["collapse of bits of group 1"]
    assert "local_kl_start 8" in model.complaints()["collapse of bits of group 1"]  # twice what it is
    model(x, 9)  # where the warm-up ends
    local = ["collapse of local latents 2x2", "collapse of local latents 4x4"]
    assert sorted(model.complaints()) == ["collapse of bits of group 1", *local]
    assert not any("local_kl_start" in model.complaints()[name] for name in local)
    at_once = make("dvaepp", **{**options, "kl_warmup_steps": 0})
    assert [*at_once.complaints()] == ["local_kl_start"]


# Convolutional networks with local latents


def conv_model(**options) -> BinaryVAE:
    network = {"type": "conv", "hidden_dims": (8, 8), "local_dims": (1, 1), "global_dim": 8}
    return make("dvaepp", 0.15, image_shape=(1, 4, 4), network={**network, **options})


def test_local_weights_estimate_the_same_likelihood_for_any_posterior():
    """log p(x | z) by importance weighting must not depend on q(h | x, z)."""
    model = conv_model(local_dims=(1, 0))
    x = (torch.rand(1, 1, 4, 4, generator=torch.Generator().manual_seed(3)) < 0.5).double()
    count = 20_000
    bits = states(4)[5].expand(count, -1)
    estimates, errors = [], []
    for scale in (1.0, 0.0):  # the posterior as it is, then the prior as posterior
        with torch.no_grad():
            for layer in model.network.locals:
                if layer is not None:
                    layer.posterior[1].weight *= 0.5 * scale
                    layer.posterior[1].bias *= 0.5 * scale
            torch.manual_seed(0)
            features = [f.expand(count, *f.shape[1:]) for f in model.features(x)]
            decoded = model.decode_latents(bits, features)
            (group,) = decoded.local.values()
            weights = (group.log_ratio - model.likelihood.nll(decoded.params, x.expand(count, -1, -1, -1))).exp()
            if scale:
                spread = group.log_ratio.std() / math.sqrt(count)
                assert abs(-group.log_ratio.mean() - group.kl.mean()) < 4.5 * spread
                assert group.kl.mean() > 0.01
            else:
                assert torch.equal(group.kl, torch.zeros_like(group.kl))
        estimates.append(weights.mean())
        errors.append(weights.std() / math.sqrt(count))
    assert abs(estimates[0] - estimates[1]) < 4.5 * math.hypot(*errors)


def test_local_latents_belong_to_their_image():
    model = conv_model().float()
    codes = (torch.randint(2, (3, 4)),)
    seeds = lambda *numbers: [torch.Generator().manual_seed(n) for n in numbers]  # noqa: E731
    together = model.decode(codes, seeds(0, 1, 2))
    alone = model.decode((codes[0][1:2],), seeds(1))
    torch.testing.assert_close(together[1:2], alone)
    assert not torch.allclose(model.decode(codes, seeds(3, 4, 5)), together)


def test_without_local_latents_the_decoder_draws_nothing():
    model = conv_model(local_dims=()).float()
    codes = (torch.randint(2, (3, 4)),)
    assert not model.network.has_local
    assert torch.equal(model.decode(codes), model.decode(codes))


def test_balancing_taxes_groups_in_proportion_to_their_use_and_ends_with_the_warm_up():
    rich = LocalGroup(torch.tensor([4.0, 8.0]), torch.zeros(2), 10)
    poor = LocalGroup(torch.tensor([1.0, 3.0]), torch.zeros(2), 10)
    local = {"a": rich, "b": poor}
    torch.testing.assert_close(balanced_kl(local, 1.0), torch.tensor([5.0, 11.0]))
    expected = 0.5 * (torch.tensor([4.0, 8.0]) * 1.5 + torch.tensor([1.0, 3.0]) * 0.5)
    torch.testing.assert_close(balanced_kl(local, 0.5), expected, rtol=1e-3, atol=1e-3)


def conv_bound(name: str, num_draws: int, shift: float) -> tuple[BinaryVAE, torch.Tensor, torch.Tensor]:
    """A model whose local posteriors lie `shift` from their priors, an image, and the loss without log Z."""
    network = {"type": "conv", "hidden_dims": (8, 8), "local_dims": (1, 0), "global_dim": 8}
    model = make(name, 0.15, image_shape=(1, 4, 4), network=network, num_draws=num_draws)
    posterior = model.network.locals[0].posterior[1]
    x = (torch.rand(1, 1, 4, 4, generator=torch.Generator().manual_seed(3)) < 0.5).double()
    with torch.no_grad():
        posterior.weight.zero_()
        posterior.bias.copy_(torch.tensor([shift, 0.0]))
        torch.manual_seed(1)
        losses, _, _ = model.bound(x.expand(num_draws, -1, -1, -1), 1.0)
    return model, x, losses.get("bound", losses.get("bound_minus_log_partition"))


@pytest.mark.parametrize("name", ["concrete", "dvaesharp", "gaussian_integral", "gumbolt"])
def test_the_bound_of_many_draws_does_not_depend_on_the_local_posterior(name):
    """Its KL of 1.28 nats in four latents is what the analytic one would be off by."""
    bounds = [conv_bound(name, 4000, shift)[2].item() for shift in (0.8, 0.0)]
    assert bounds[0] == pytest.approx(bounds[1], abs=0.2)  # weights vary by 3.5 times their mean


def test_the_loss_of_many_draws_is_the_evaluated_bound():
    model, x, loss = conv_bound("vimco", 400, 0.8)
    torch.manual_seed(1)  # the same draws
    draw = model.draw_posterior(x.expand(400, -1, -1, -1))
    log_weights = draw.log_likelihood + model.log_prior(draw.codes) - draw.log_q
    expected = math.log(400) - log_weights.logsumexp(dim=0)
    torch.testing.assert_close(loss + model.prior.log_partition().value, expected)


def test_the_mean_of_one_draw_bounds_keeps_the_analytic_kl_of_local_latents():
    at_prior, shifted = (conv_bound("reinforce", 400, shift)[2].item() for shift in (0.0, 0.8))
    assert shifted - at_prior == pytest.approx(4 * 0.8**2 / 2, abs=0.1)  # the draws' own would vary by 0.08


# Precision


@pytest.mark.parametrize("name", ["gaussian_integral", "dvaesharp"])
def test_marginal_densities_are_float32_also_under_autocast_and_in_half_precision(name):
    model = make(name, num_groups=2, bits_per_group=8).float()
    model.prior.bfloat16()  # parameters that are the same numbers in float32
    latents = torch.randn(20, 16)
    arguments = (4.0,) if name == "gaussian_integral" else ()
    density = unnormalized_log_density if name == "gaussian_integral" else unnormalized_log_marginal
    expected = density(model.prior.float(), latents, *arguments)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(density(model.prior, latents, *arguments), expected)
    assert torch.equal(density(model.prior.bfloat16(), latents, *arguments), expected)


@pytest.mark.parametrize("training", [False, True], ids=["evaluation", "training"])
def test_bits_drawn_in_half_precision_follow_log_q(training):
    logits = torch.tensor([-10.0, -7.0, -5.0, 0.0])  # that bfloat16 holds exactly
    model = make("vimco", num_groups=1, bits_per_group=4, network={"type": "mlp", "num_layers": 0}).float()
    with torch.no_grad():
        model.network.encoders[0][0].weight.zero_()
        model.network.encoders[0][0].bias.copy_(logits)
    images = image().float().expand(200_000, -1, -1, -1)
    torch.manual_seed(0)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        drawn = model.bound(images, 1.0)[1].latents if training else model.draw_posterior(images).codes[0]
    p = logits.double().sigmoid()
    error = (p * (1 - p) / len(images)).sqrt()
    assert ((drawn.double().mean(dim=0) - p).abs() < 5 * error + 1 / len(images)).all()


@pytest.mark.parametrize("name", BINARY)
def test_a_step_in_float32_may_be_followed_by_one_in_half_precision(name):
    model, x = make(name).float().train(), image().float().expand(4, -1, -1, -1)
    model(x)
    with torch.autocast("cpu", torch.bfloat16):
        losses = model(x).losses
    sum(losses.values()).backward()
    assert all(loss.isfinite() for loss in losses.values())
    assert {nats.dtype for nats, _ in model.nats_by_group.values()} == {torch.float32}


# Refusals


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("dvaepp", {"num_groups": 3}, "num_groups must be 1 or even, got 3"),
        ("dvaepp", {"num_groups": 0}, "num_groups must be at least 1, got 0"),
        ("dvaepp", {"weight_decay": -1.0}, "weight_decay must be at least 0, got -1"),
        ("dvaepp", {"num_groups": 1, "bits_per_group": 1}, "at least two bits"),
        ("dvaepp", {"prior": {"type": "rbn"}}, "unknown prior 'rbn'; did you mean 'rbm'"),
        ("dvaepp", {"smoothing": {"type": "power", "bta": 3}}, "no option 'bta'; did you mean 'beta'"),
        ("dvaepp", {"network": {"type": "conv", "local_dims": (1,)}}, "for each of the 4 scales"),
        ("vimco", {"num_draws": 1}, "num_draws of at least 2"),
        ("concrete", {"prior": {"type": "rbm"}}, "take tokenizer 'gumbolt'"),
        ("gumbolt", {"temperature": 0.0}, "temperature must be above 0, got 0"),
        ("gaussian_integral", {"prior": {"type": "bernoulli"}}, "that of a Boltzmann machine"),
        ("dvae", {"beta": 89.0}, "beta must be above 0 and at most 80, got 89"),
    ],
)
def test_configurations_that_cannot_work_are_refused(name, options, message):
    with pytest.raises(ValueError, match=message):
        make(name, **options)
