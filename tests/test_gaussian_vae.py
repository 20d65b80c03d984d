"""The Gaussian variational autoencoder and the class-conditional one, against models whose log p(x) is known exactly.

With affine networks and normal pixels the model is probabilistic PCA (Tipping & Bishop 1999): x = W z + b + noise, so
that log p(x) and the posterior are closed forms. At the exact posterior every importance weight equals log p(x).
"""

import math

import pytest
import torch
from torch import Tensor, distributions

from pipelines import Pipeline
from pipelines.checkpoint import build_tokenizer, load_tokenizer, save_model
from pipelines.evaluation.likelihood import evaluate_likelihood
from pipelines.objectives import TokenizerLoss
from pipelines.runs import find_codes
from tests import tiny
from tokenizer.gaussian_vae import DiagonalNormal
from tokenizer.latent_vae import COLLAPSED_NATS_PER_LATENT

SHAPE, NUM_PIXELS, NUM_LATENTS, NUM_CLASSES = (1, 2, 3), 6, 2, 3
NOISE = 0.05  # deviation of a pixel, twelve grey values: the mass of a bin is its width times the density, to 1e-3
AFFINE = {"type": "mlp", "num_layers": 0}


def seed(number: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(number)


class LinearGaussian:
    """x = W z + b + v_y + noise, with classes y or without; W has orthogonal columns, so that latents are independent
    given x."""

    def __init__(self, num_classes: int = 0):
        basis, _ = torch.linalg.qr(torch.randn(NUM_PIXELS, NUM_LATENTS, generator=seed(), dtype=torch.float64))
        self.w = basis * torch.tensor([0.15, 0.08])
        self.b = 0.5 + 0.03 * torch.randn(NUM_PIXELS, generator=seed(1), dtype=torch.float64)
        self.v = 0.08 * torch.randn(max(num_classes, 1), NUM_PIXELS, generator=seed(2), dtype=torch.float64)
        self.v *= bool(num_classes)
        self.m = self.w.square().sum(0) + NOISE**2  # the posterior precision times the noise's variance
        self.covariance = self.w @ self.w.T + NOISE**2 * torch.eye(NUM_PIXELS, dtype=torch.float64)

    def images(self, count: int) -> Tensor:
        """Draws of x in 256 values."""
        z = torch.randn(count, NUM_LATENTS, generator=seed(3), dtype=torch.float64)
        noise = NOISE * torch.randn(count, NUM_PIXELS, generator=seed(4), dtype=torch.float64)
        x = z @ self.w.T + self.b + self.v[torch.arange(count) % len(self.v)] + noise
        return ((255 * x).round() / 255).clamp(0.01, 0.99).float().unflatten(1, SHAPE)

    def log_prob_by_class(self, images: Tensor) -> Tensor:
        """log p(x | y) of the 256 values of each pixel, (B, Y) nats."""
        normal = distributions.MultivariateNormal(self.b + self.v, self.covariance)
        return normal.log_prob(images.flatten(1).double().unsqueeze(1)) - NUM_PIXELS * math.log(255)

    def log_prob(self, images: Tensor) -> Tensor:
        return self.log_prob_by_class(images).logsumexp(1) - math.log(len(self.v))

    def tokenizer(self, **options):
        """A VAE that is this model, with its exact posterior as encoder."""
        fields = {"image_shape": SHAPE, "latent_dim": NUM_LATENTS, "network": AFFINE, "weight_decay": 0.0, **options}
        model = build_tokenizer({"type": "gaussian_vae", "likelihood": {"type": "normal"}, **fields})
        *_, posterior = model.network.encoders
        means = self.w.T / self.m[:, None]
        shifts = [-means @ self.v.T] if model.num_classes else []
        with torch.no_grad():
            model.likelihood.scale_parameter.fill_(math.log(NOISE) / model.likelihood.scale_speed)
            model.mean_image.copy_(self.b.view(SHAPE))
            # the likelihood's location is (params + 1) / 2
            decoder = torch.cat([self.v.T, self.w] if model.num_classes else [self.w], dim=1)
            model.network.decoder[0].weight.copy_(2 * decoder)
            model.network.decoder[0].bias.copy_(2 * self.b - 1)
            posterior[0].weight.zero_()[:NUM_LATENTS] = torch.cat([means, *shifts], dim=1)
            posterior[0].bias.zero_()[NUM_LATENTS:] = (NOISE / self.m.sqrt()).log()
            if model.num_classes:  # linear discriminant analysis
                directions = torch.linalg.solve(self.covariance, self.v.T).T
                classifier = model.network.encoders[0][0]
                classifier.weight.zero_()[:NUM_CLASSES] = directions
                classifier.bias.zero_()[:NUM_CLASSES] = -(directions * self.v).sum(1) / 2
        return model


class Images:
    """A data set as `evaluate_likelihood` reads it."""

    num_classes = NUM_CLASSES

    def __init__(self, images: Tensor):
        self.images, self.labels = images, torch.arange(len(images)) % NUM_CLASSES

    def __len__(self) -> int:
        return len(self.images)

    def __getitems__(self, keys: list[int]) -> list[int]:
        return keys

    def collate(self, keys: list[int]) -> dict:
        return {"image": self.images[keys], "label": self.labels[keys]}


def make(name: str = "gaussian_vae", **options):
    return build_tokenizer({"type": name, **tiny.TOKENIZERS[name], **options})


def log_weights(model, images: Tensor) -> Tensor:
    draw = model.draw_posterior(images)
    return draw.log_likelihood + model.log_prior(draw.codes) - draw.log_q


# The bound, against exact log p(x)
# ------------------------------------------------------------------------------------------------

WAYS = {
    "gaussian_vae": {},
    "mixture": {"prior": {"type": "gaussian_mixture", "num_components": 2}},
    "cvae": {"type": "cvae", "num_classes": NUM_CLASSES},
}


def exact_model(way: str, **options):
    model = LinearGaussian(NUM_CLASSES if way == "cvae" else 0)
    tokenizer = model.tokenizer(**WAYS[way], **options)
    with torch.no_grad():
        for parameter in tokenizer.prior.parameters():  # two standard normal components are one
            parameter.zero_()
    return model, tokenizer


@pytest.mark.parametrize("way", WAYS)
def test_every_weight_of_the_exact_posterior_is_log_p_of_x(way):
    torch.manual_seed(0)
    model, tokenizer = exact_model(way)
    images = model.images(50)
    torch.testing.assert_close(
        log_weights(tokenizer.eval(), images).double(), model.log_prob(images), rtol=0, atol=0.02
    )


@pytest.mark.parametrize("num_draws", [1, 3])
@pytest.mark.parametrize("way", WAYS)
def test_the_evaluated_bound_is_exact_where_the_posterior_is(way, num_draws):
    model, tokenizer = exact_model(way)
    images = model.images(30)
    result = evaluate_likelihood(Pipeline(tokenizer), Images(images), num_draws=num_draws, progress=False)
    assert result["nats"] == pytest.approx(-model.log_prob(images).mean().item(), abs=0.005)
    assert result["num_draws"] == num_draws
    assert all(math.isfinite(value) for value in result.values())


def test_a_wrong_posterior_costs_its_divergence_and_more_draws_make_it_good():
    torch.manual_seed(0)
    model, tokenizer = exact_model("gaussian_vae")
    with torch.no_grad():
        bias = tokenizer.network.encoders[0][0].bias
        bias[:NUM_LATENTS] += 0.2
        bias[NUM_LATENTS:] += 0.4
    images = model.images(4)
    exact, variance = model.log_prob(images), NOISE**2 / model.m
    divergence = (0.2**2 / variance + math.exp(0.8) - 1).sum() / 2 - 0.4 * NUM_LATENTS
    repeated = images.repeat(4000, 1, 1, 1)
    weights = log_weights(tokenizer.eval(), repeated).double().view(4000, 4)
    error = 5 * weights.std(0) / 4000**0.5
    assert ((weights.mean(0) - (exact - divergence)).abs() < error + 0.005).all()
    bound = weights.unflatten(0, (40, 100)).logsumexp(1) - math.log(100)
    torch.testing.assert_close(bound.mean(0), exact, rtol=0, atol=0.05)
    assert divergence > 0.5


# Training
# ------------------------------------------------------------------------------------------------


def losses(tokenizer, images: Tensor, step: int | None = None) -> dict[str, Tensor]:
    labels = (torch.arange(len(images)) % NUM_CLASSES,) if tokenizer.num_classes else ()
    return tokenizer.train()(images, step, *labels).losses


@pytest.mark.parametrize("way", WAYS)
def test_the_training_loss_is_the_bound(way):
    torch.manual_seed(0)
    model, tokenizer = exact_model(way)
    images = model.images(6000)
    found = losses(tokenizer, images)
    by_class = model.log_prob_by_class(images)
    expected = -by_class.gather(1, (torch.arange(6000) % len(model.v))[:, None]).mean().item()
    assert (found["reconstruction"] + found["kl"]).item() == pytest.approx(expected, abs=0.08)  # 6000 draws of about 1
    if way == "cvae":
        classification = -by_class.log_softmax(1).gather(1, (torch.arange(6000) % NUM_CLASSES)[:, None]).mean()
        assert found["classification"].item() == pytest.approx(classification.item(), abs=1e-4)


@pytest.mark.parametrize("way", ["gaussian_vae", "mixture"])
def test_several_draws_train_the_importance_weighted_bound(way):
    model, tokenizer = exact_model(way, num_draws=4)
    images = model.images(30)
    out = tokenizer.train()(images)
    assert out.losses["bound"].item() == pytest.approx(-model.log_prob(images).mean().item(), abs=0.005)
    assert out.images.shape == images.shape
    tokenizer.spec.check(out.codes)
    assert len(out.codes[0]) == 30


def test_several_draws_are_averaged_as_weights():
    """The bound of k draws is not the mean of k bounds."""
    torch.manual_seed(0)
    model, tokenizer = exact_model("gaussian_vae", num_draws=50)
    with torch.no_grad():
        tokenizer.network.encoders[0][0].bias[NUM_LATENTS:] += 0.5
    images = model.images(200)
    assert losses(tokenizer, images)["bound"].item() == pytest.approx(-model.log_prob(images).mean().item(), abs=0.05)


def test_several_draws_weigh_local_latents_at_their_draws():
    """As evaluation does; with their analytic KL in the weights the loss would be no bound."""
    network = {"type": "conv", "hidden_dims": (8, 8), "local_dims": (2, 2), "global_dim": 8}
    torch.manual_seed(0)
    model = make(image_shape=(1, 4, 4), likelihood={"type": "bernoulli"}, network=network, num_draws=400)
    with torch.no_grad():
        for latents in model.network.locals:
            latents.posterior[1].bias += 0.5
    image = torch.rand(1, 1, 4, 4).round()
    torch.manual_seed(1)
    loss = losses(model, image)["bound"]
    torch.manual_seed(1)  # the same draws
    expected = math.log(400) - log_weights(model, image.expand(400, -1, -1, -1)).logsumexp(0)
    torch.testing.assert_close(loss, expected)
    assert sum(model.nats_by_group[f"local latents {side}x{side}"][0] for side in (2, 4)) > 2


def test_the_divergence_is_that_of_quadrature():
    q = DiagonalNormal(torch.tensor([[0.7, -1.2]]), torch.tensor([[-0.5, 0.4]]))
    z = torch.linspace(-15, 15, 30001, dtype=torch.float64)
    for latent in range(2):
        log_q = distributions.Normal(q.mean[0, latent].double(), q.log_std[0, latent].double().exp()).log_prob(z)
        log_p = distributions.Normal(torch.zeros((), dtype=torch.float64), 1).log_prob(z)
        expected = (log_q.exp() * (log_q - log_p)).sum() * 0.001
        assert q.kl_to_standard()[0, latent].item() == pytest.approx(expected.item(), abs=1e-5)


def test_the_weight_of_the_divergence_is_beta_after_the_warm_up():
    model = LinearGaussian()
    images = model.images(10)
    plain = losses(model.tokenizer(), images)["kl"].item()
    annealed = model.tokenizer(beta=4.0, kl_warmup_steps=10)
    kls = [losses(annealed, images, step)["kl"].item() for step in (0, 4, 9, 100, None)]
    assert kls == pytest.approx([0.4 * plain, 2 * plain, 4 * plain, 4 * plain, 4 * plain])
    assert annealed.eval().scores(images, annealed(images))["kl"].mean().item() < 3 * plain  # evaluation knows no beta


def test_free_nats_leave_latents_alone_that_cost_less():
    model = make(latent_dim=2, network=AFFINE, free_nats=0.5)
    with torch.no_grad():
        encoder = model.network.encoders[0][0]
        encoder.weight.zero_()
        encoder.bias.copy_(torch.tensor([0.4, 1.5, 0.0, 0.0]))  # KL of 0.08 and 1.125 nats
    kl = losses(model, torch.zeros(3, 3, 8, 8))["kl"]
    (gradient,) = torch.autograd.grad(kl, encoder.bias)
    assert kl.item() == pytest.approx(0.5 + 1.125)
    assert gradient.tolist() == pytest.approx([0, 1.5, 0, 0])


def test_free_nats_are_those_of_the_mean_over_the_batch():
    model = make(latent_dim=1, network=AFFINE, free_nats=0.5)
    with torch.no_grad():
        encoder = model.network.encoders[0][0]
        encoder.weight.zero_()[0, 0] = 2.0
        encoder.bias.zero_()
        model.mean_image.zero_()
    images = torch.zeros(2, 3, 8, 8)
    images[0, 0, 0, 0] = 1.0  # KL of 2 and 0 nats
    assert losses(model, images)["kl"].item() == pytest.approx(1.0)


@pytest.mark.parametrize(
    "options",
    [{"num_draws": 2}, {"prior": {"type": "gaussian_mixture", "num_components": 3}}],
    ids=["draws", "mixture"],
)
def test_free_nats_need_the_divergence_of_each_latent(options):
    with pytest.raises(ValueError, match=r"free_nats = 0.1 needs the KL of each latent"):
        make(free_nats=0.1, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"latent_dim": 0}, "latent_dim must be at least 1, got 0"),
        ({"beta": -1.0}, "beta must be at least 0, got -1.0"),
        ({"free_nats": -0.1}, "free_nats must be at least 0, got -0.1"),
        ({"num_draws": 0}, "num_draws must be at least 1, got 0"),
        ({"weight_decay": -1.0}, "weight_decay must be at least 0, got -1.0"),
        ({"prior": {"type": "rbm"}}, "unknown prior 'rbm'"),
        ({"num_classes": 3}, "no field 'num_classes'"),
    ],
)
def test_settings_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        make(**options)


# Collapse
# ------------------------------------------------------------------------------------------------


def trained(images: Tensor, **options):
    torch.manual_seed(0)
    model = make(network={"type": "mlp", "hidden_dim": 16, "num_layers": 1}, **options)
    model.initialize(images)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for step in range(400):
        optimizer.zero_grad()
        sum(losses(model, images, step).values()).backward()
        optimizer.step()
    return model


def test_collapse_is_said_of_latents_that_carry_nothing_and_of_no_others():
    noise = (torch.rand(64, 3, 8, 8, generator=seed()) < 0.5).float()
    shapes = torch.zeros(64, 3, 8, 8)
    shapes[:32, :, :4], shapes[32:, :, 4:] = 1.0, 1.0
    collapsed, healthy = trained(noise, beta=100.0), trained(shapes)
    assert healthy.complaints() == {}
    complaint = collapsed.complaints()["collapse of latents z"]
    assert "nats per image in 4 latents" in complaint
    assert "kl_warmup_steps" in complaint
    assert healthy.nats_by_group["latents z"][0] > math.log(2)  # which half is light is one bit
    assert collapsed.nats_by_group["latents z"][0] < 4 * COLLAPSED_NATS_PER_LATENT


def test_collapse_reaches_the_loop_by_name():
    objective = TokenizerLoss(make())
    objective.model.nats_by_group["latents z"] = (torch.tensor(0.001), 4)
    assert list(objective.complaints()) == ["collapse of latents z"]


# Codes that are numbers
# ------------------------------------------------------------------------------------------------


def test_codes_are_the_means_or_draws():
    model, tokenizer = exact_model("gaussian_vae")
    tokenizer.eval()
    images = model.images(3).expand(3, *SHAPE).repeat_interleave(2000, dim=0)
    (means,), (draws,) = tokenizer.encode(images), tokenizer.encode(images, sample=True)
    expected = (images.flatten(1).double() - model.b) @ model.w / model.m
    torch.testing.assert_close(means.double(), expected, rtol=0, atol=1e-4)
    deviation = (draws - means).double().std(0)
    torch.testing.assert_close(deviation, NOISE / model.m.sqrt(), rtol=0.05, atol=0)


def test_a_line_between_two_images_ends_at_their_reconstructions():
    model, tokenizer = exact_model("gaussian_vae")
    pipeline, images = Pipeline(tokenizer), model.images(2)
    line = pipeline.interpolate(images[:1], images[1:], 3, output_type="pt")
    ends = pipeline.reconstruct(images, output_type="pt")
    torch.testing.assert_close(line[[0, 2]], ends)
    torch.testing.assert_close(line[1], ends.mean(0))  # the decoder is affine


def test_stage_two_says_why_there_is_none(tmp_path):
    save_model(make(), tmp_path / "run" / "tokenizer")
    with pytest.raises(ValueError, match=r"stage two takes integer codes, but level 0 of .* holds real numbers"):
        find_codes(str(tmp_path / "run"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"has no codes/train/spec.json"):
        find_codes(str(tmp_path / "empty"))


def test_the_model_card_speaks_of_numbers(tmp_path):
    Pipeline(make("cvae"), class_names=["cat", "dog", "owl"]).save_pretrained(tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert "1 codes of 3, 4 real numbers" in card
    assert "cat, dog, owl" in card


# Classes
# ------------------------------------------------------------------------------------------------


def test_training_needs_labels_of_the_classes():
    model = make("cvae").train()
    images = torch.zeros(2, 3, 8, 8)
    with pytest.raises(ValueError, match="conditional on 3 classes: give labels"):
        model(images)
    with pytest.raises(ValueError, match=r"labels must lie in \[0, 3\)"):
        model(images, None, torch.tensor([0, 3]))
    with pytest.raises(ValueError, match="num_classes must be at least 1, got 0"):
        make("cvae", num_classes=0)


def test_the_objective_gives_a_conditional_tokenizer_its_labels():
    torch.manual_seed(0)
    model, tokenizer = exact_model("cvae")
    images = Images(model.images(300)).collate(list(range(300)))
    objective = TokenizerLoss(tokenizer)
    right = objective.train()(images)
    wrong = objective({**images, "label": (images["label"] + 1) % NUM_CLASSES})
    assert wrong["classification"] > 2 * right["classification"]
    assert wrong["reconstruction"] + wrong["kl"] > right["reconstruction"] + right["kl"] + 1
    assert objective.eval()(images)["negative_elbo"].mean().item() == pytest.approx(
        -model.log_prob(images["image"]).mean().item(), abs=0.01
    )


def test_the_encoder_knows_the_class_and_another_one_decodes_elsewhere():
    model, tokenizer = exact_model("cvae")
    images = model.images(300)
    classes, z = tokenizer.eval().encode(images)
    assert torch.equal(classes[:, 0], model.log_prob_by_class(images).argmax(1))
    other = tokenizer.decode(((classes + 1) % NUM_CLASSES, z)) - tokenizer.decode((classes, z))
    expected = (model.v.roll(-1, 0) - model.v)[classes[:, 0]].float().unflatten(1, SHAPE)
    torch.testing.assert_close(other, expected, rtol=0, atol=1e-4)


def test_classes_are_drawn_in_proportion_to_their_probability():
    torch.manual_seed(0)
    model, tokenizer = exact_model("cvae")
    image = model.images(2)[1:].expand(6000, *SHAPE)
    classes, _ = tokenizer.eval().encode(image, sample=True)
    expected = model.log_prob_by_class(image[:1]).softmax(1)[0]
    assert expected.max() < 0.99  # or there were nothing to see
    torch.testing.assert_close(classes[:, 0].bincount(minlength=3) / 6000.0, expected.float(), rtol=0, atol=0.03)


def test_a_pipeline_draws_images_of_a_class(tmp_path):
    model, tokenizer = exact_model("cvae")
    Pipeline(tokenizer, class_names=["cat", "dog", "owl"]).save_pretrained(tmp_path)
    pipeline = Pipeline.from_pretrained(tmp_path)
    pipeline.set_progress_bar_config(disable=True)
    classes, _ = pipeline.sample(class_labels=["owl", "cat", "dog"], output_type="codes")
    assert classes[:, 0].tolist() == [2, 0, 1]
    images = pipeline.sample(900, class_labels=[0, 1, 2] * 300, generator=seed(), output_type="pt")
    means = images.flatten(1).unflatten(0, (300, 3)).mean(0)
    torch.testing.assert_close(means.double(), model.b + model.v, rtol=0, atol=0.03)
    drawn, _ = pipeline.sample(300, generator=seed(), output_type="codes")
    assert drawn.unique().tolist() == [0, 1, 2]


def test_the_prior_of_a_class_does_not_depend_on_the_default_device_of_new_tensors():
    model = make("cvae").eval()
    codes = model.encode(torch.rand(2, *model.config.image_shape))
    plain = model.log_prior(codes)
    torch.set_default_device("meta")
    try:
        changed = model.log_prior(codes)
    finally:
        torch.set_default_device(None)
    assert torch.equal(plain, changed)


def test_a_conditional_tokenizer_loads_with_its_classes(tmp_path):
    tokenizer = make("cvae").eval()
    save_model(tokenizer, tmp_path / "model")
    loaded, images = load_tokenizer(tmp_path / "model"), torch.rand(3, 3, 8, 8, generator=seed())
    assert loaded.num_classes == loaded.prior.num_classes == 3
    for before, after in zip(tokenizer.encode(images), loaded.encode(images)):
        assert torch.equal(before, after)
