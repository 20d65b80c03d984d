"""The bound on log p(x), against enumeration of all codes."""

import itertools
import math

import pytest
import torch

from pipelines import Pipeline
from pipelines.checkpoint import build_prior, build_tokenizer, fingerprint
from pipelines.evaluation.likelihood import (
    evaluate_likelihood,
    log_likelihoods,
    log_partition_metrics,
    prior_labels,
    prior_log_prob,
    set_ais_sizes,
    standard_error,
)
from pipelines.metrics import NotMeasurableError
from prior import PRIORS
from prior.annealed_importance import LogPartition
from prior.base import CodeSpec, Prior, PriorConfig
from tests import tiny
from tokenizer import TOKENIZERS
from tokenizer.base import PosteriorDraw, Tokenizer, TokenizerConfig
from tokenizer.likelihoods import LIKELIHOODS

NUM_CLASSES = 3
CLASS_NAMES = ["a", "b", "c"]


class BinaryImages:
    """Images of two values, which every likelihood takes, with labels."""

    class_names = CLASS_NAMES

    def __init__(self, shape: tuple[int, int, int], num_images: int = 7):
        generator = torch.Generator().manual_seed(1)
        self.images = (torch.rand(num_images, *shape, generator=generator) > 0.5).float()
        self.labels = torch.randint(NUM_CLASSES, (num_images,), generator=generator)

    def __len__(self) -> int:
        return len(self.images)

    def __getitems__(self, keys: list[int]) -> list[int]:
        return keys

    def collate(self, keys: list[int]) -> dict:
        return {"image": self.images[keys], "label": self.labels[keys]}


def make(prior: str | None = "pixelcnn", num_classes: int = 0, likelihood: str = "bernoulli") -> Pipeline:
    """A tokenizer with 4 codes of 3 values, 81 latents in all; of 4 values for the priors over bits."""
    codebook_size = 4 if prior in tiny.BIT_PRIORS else 3
    config = {
        **tiny.TOKENIZERS["vqvae"],
        "image_shape": (1, 4, 4),
        "downsample_factor": 2,
        "quantizer": {"type": "vq", "codebook_size": codebook_size, "code_dim": 4},
        "likelihood": {"type": likelihood, **tiny.LIKELIHOODS[likelihood]},
    }
    tokenizer = build_tokenizer({"type": "vqvae", **config})
    tokenizer.initialize(BinaryImages((1, 4, 4)).images)
    if prior is None:
        return Pipeline(tokenizer)
    if not tiny.takes(prior, tokenizer.spec, num_classes):
        pytest.skip(f"{prior} is not made for these codes")
    implied = {"spec": tokenizer.spec, "num_classes": num_classes, "tokenizer_fingerprint": fingerprint(tokenizer)}
    built = build_prior({"type": prior, **tiny.PRIORS[prior], **implied})
    return Pipeline(tokenizer, built, class_names=CLASS_NAMES[:num_classes])


def evaluate(pipeline: Pipeline, images, **options) -> dict:
    return evaluate_likelihood(pipeline, images, progress=False, **options)


def all_codes(spec) -> tuple[torch.Tensor, ...]:
    ranges = [range(k) for n, k in zip(spec.lengths, spec.vocab_sizes) for _ in range(n)]
    return spec.unflatten(torch.tensor(list(itertools.product(*ranges))))


@torch.no_grad()
def log_joint(pipeline: Pipeline, image: torch.Tensor) -> torch.Tensor:
    """log p(x, z) for every z there is: (number of codes,), with the average over classes written out."""
    codes, prior = all_codes(pipeline.tokenizer.spec), pipeline.prior
    count = len(codes[0])
    log_px = -pipeline.tokenizer.nll(image.expand(count, -1, -1, -1), codes).double()
    if prior.num_classes == 0:
        return log_px + prior.log_prob(codes).double()
    p = sum(prior.log_prob(codes, torch.full((count,), y)).double().exp() for y in range(prior.num_classes))
    return log_px + (p / prior.num_classes).log()


@pytest.mark.parametrize("likelihood", sorted(LIKELIHOODS))
@pytest.mark.parametrize("num_classes", [0, NUM_CLASSES])
@pytest.mark.parametrize("prior", [None, *sorted(PRIORS)])
def test_the_bound_is_the_joint_at_the_encoded_codes_and_below_log_p_of_x(prior, num_classes, likelihood):
    pipeline = make(prior, num_classes if prior else 0, likelihood)
    images = BinaryImages((1, 4, 4))
    bounds, exact = [], []
    for image in images.images:
        joint = log_joint(pipeline, image)
        sequence = pipeline.tokenizer.spec.flatten(pipeline.tokenizer.encode(image[None]))[0]
        (size,) = pipeline.tokenizer.spec.vocab_sizes
        index = sum(code.item() * size ** (3 - place) for place, code in enumerate(sequence))
        bounds.append(joint[index].item())
        exact.append(joint.logsumexp(0).item())
    result = evaluate(pipeline, images)
    assert all(bound < log_p for bound, log_p in zip(bounds, exact))
    assert result["nats"] == pytest.approx(-sum(bounds) / len(bounds), rel=1e-5)
    assert result["nats"] > -sum(exact) / len(exact)


def test_the_prior_and_the_decoder_are_distributions_of_what_they_say():
    pipeline = make("gpt", NUM_CLASSES)
    codes = all_codes(pipeline.tokenizer.spec)
    with torch.no_grad():
        _, marginal = prior_log_prob(pipeline.prior, codes, torch.zeros(len(codes[0]), dtype=torch.int64))
    assert marginal.double().exp().sum().item() == pytest.approx(1, abs=1e-5)


def test_the_marginal_is_the_average_over_classes_and_the_conditional_the_one_of_the_label():
    prior = make("gpt", NUM_CLASSES).prior
    codes = tuple(code[:9] for code in all_codes(prior.spec))
    labels = torch.arange(9) % NUM_CLASSES
    with torch.no_grad():
        conditional, marginal = prior_log_prob(prior, codes, labels)
        torch.testing.assert_close(conditional, prior.log_prob(codes, labels))
        average = sum(prior.log_prob(codes, torch.full_like(labels, y)).exp() for y in range(NUM_CLASSES)) / NUM_CLASSES
    torch.testing.assert_close(marginal.exp(), average)


def renamed(names: list[str]) -> BinaryImages:
    images = BinaryImages((1, 4, 4))
    images.class_names = names
    return images


def test_labels_are_those_of_the_prior_by_the_names_of_their_classes():
    pipeline, images = make("gpt", NUM_CLASSES), renamed(["c", "a", "b"])
    expected = evaluate(pipeline, images)["prior_nats_per_code"]
    images.labels = torch.tensor([2, 0, 1])[images.labels]  # of "c", "a", "b" in the prior
    images.class_names = CLASS_NAMES
    assert evaluate(pipeline, images)["prior_nats_per_code"] == pytest.approx(expected)
    codes = pipeline.tokenizer.encode(images.images)
    with torch.no_grad():
        assert expected == pytest.approx(-pipeline.prior.log_prob(codes, images.labels).mean().item() / 4, rel=1e-5)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["a", "b", "dog"], r"images of the prior's classes \(a, b, c\), which dog are not"),
        ([*CLASS_NAMES, "d"], "which d are not"),
        ([], "these images have none"),
    ],
)
def test_labels_of_classes_that_the_prior_does_not_know_are_not_scored(names, message):
    pipeline, images = make("gpt", NUM_CLASSES), renamed(names)
    if len(names) == 4:
        images.labels[0] = 3
    found, expected = evaluate(pipeline, images), evaluate(pipeline, BinaryImages((1, 4, 4)))
    assert math.isnan(found.pop("prior_nats_per_code"))
    del expected["prior_nats_per_code"]
    assert found == expected
    with pytest.raises(NotMeasurableError, match=message):
        prior_labels(pipeline, images)


def test_the_parts_add_up_and_each_is_in_its_unit():
    pipeline, images = make("gpt", NUM_CLASSES), BinaryImages((1, 4, 4))
    result = evaluate(pipeline, images)
    codes = pipeline.tokenizer.encode(images.images)
    with torch.no_grad():
        nll = -pipeline.prior.log_prob(codes, images.labels).mean().item()
    assert result["nats"] == pytest.approx(result["distortion_nats"] + result["rate_nats"])
    assert result["distortion_nats"] == pytest.approx(pipeline.tokenizer.nll(images.images, codes).mean().item())
    assert result["bits_per_dim"] == pytest.approx(result["nats"] / 16 / math.log(2))
    assert result["bits_per_dim_se"] == pytest.approx(result["nats_se"] / 16 / math.log(2))
    assert result["prior_nats_per_code"] == pytest.approx(nll / 4)
    assert result["num_images"] == 7


def test_the_standard_error_is_that_of_the_mean():
    pipeline, images = make(), BinaryImages((1, 4, 4))
    alone = []
    for i in range(len(images)):
        one = BinaryImages((1, 4, 4))
        one.images, one.labels = images.images[i : i + 1], images.labels[i : i + 1]
        result = evaluate(pipeline, one)
        assert "nats_se" not in result  # one image does not tell
        alone.append(result["nats"])
    mean = sum(alone) / 7
    error = math.sqrt(sum((x - mean) ** 2 for x in alone) / 6 / 7)
    assert evaluate(pipeline, images)["nats_se"] == pytest.approx(error, rel=1e-5)
    assert standard_error(torch.tensor([1.0, 3.0])) == pytest.approx(1.0)


def test_the_batch_size_changes_nothing():
    pipeline, images = make("gpt", NUM_CLASSES), BinaryImages((1, 4, 4))
    expected = evaluate(pipeline, images, batch_size=7)
    for batch_size in (1, 3, 100):
        assert evaluate(pipeline, images, batch_size=batch_size) == pytest.approx(expected, rel=1e-6)


def test_a_uniform_prior_pays_log_k_for_each_code():
    result = evaluate(make(None), BinaryImages((1, 4, 4)))
    assert result["rate_nats"] == pytest.approx(4 * math.log(3))
    assert result["prior_nats_per_code"] == pytest.approx(math.log(3))


def test_half_precision_gives_nearly_the_same_bound():
    pipeline, images = make("gpt", NUM_CLASSES, "normal"), BinaryImages((1, 4, 4))
    full = evaluate(pipeline, images)
    assert evaluate(pipeline.to(dtype=torch.bfloat16), images)["nats"] == pytest.approx(full["nats"], rel=0.05)


def test_too_many_classes_to_average_over_are_refused():
    with pytest.raises(ValueError, match="over the prior's 101 classes, at most 100"):
        evaluate(make("gpt", 101), BinaryImages((1, 4, 4)))


def test_a_prior_over_captions_is_refused():
    tokenizer = make(None).tokenizer
    config = {"type": "gpt", **tiny.PRIORS["gpt"], "spec": tokenizer.spec, "text_vocab_size": 5, "max_text_length": 3}
    pipeline = Pipeline(tokenizer)
    pipeline.prior = build_prior({**config, "tokenizer_fingerprint": fingerprint(tokenizer)})
    with pytest.raises(NotMeasurableError, match="conditional on captions"):
        evaluate(pipeline, BinaryImages((1, 4, 4)))


@pytest.mark.parametrize("option", ["num_draws", "batch_size"])
def test_numbers_below_one_are_refused(option):
    with pytest.raises(ValueError, match=f"{option} must be at least 1, got 0"):
        evaluate(make(None), BinaryImages((1, 4, 4)), **{option: 0})


# Stochastic encoders
# ------------------------------------------------------------------------------------------------

GUMBEL = {"quantizer": {"type": "gumbel", "codebook_size": 3, "code_dim": 4}, "likelihood": {"type": "bernoulli"}}
SMALL = {"vqvae": {"downsample_factor": 2, **GUMBEL}, "vqvae2": {"codebook_sizes": (3, 2), **GUMBEL}}


def make_stochastic(name: str) -> Tokenizer:
    options = {**tiny.TOKENIZERS[name], **SMALL.get(name, {}), "image_shape": (1, 4, 4)}
    return build_tokenizer({"type": name, **options}).eval()


@pytest.mark.parametrize("name", sorted(TOKENIZERS))
def test_importance_weights_average_to_p_of_x(name):
    """E[w] = p(x) holds for one log q, log p(x | z) and log p(z) only: an error in any of them shifts the mean."""
    tokenizer = make_stochastic(name)
    if not (tokenizer.is_stochastic and tokenizer.spec.is_discrete):
        pytest.skip("its encoder has no distribution over codes that can be enumerated")
    copies, images = 40, BinaryImages((1, 4, 4), 3)
    codes = all_codes(tokenizer.spec)
    with torch.no_grad():
        log_prior = tokenizer.prior.log_prob(codes).double()
        joint = [
            log_prior - tokenizer.nll(image.expand(len(log_prior), -1, -1, -1), codes).double()
            for image in images.images
        ]
    exact = torch.stack(joint).logsumexp(dim=1)
    assert log_prior.logsumexp(0).item() == pytest.approx(0, abs=1e-4)
    images.images, images.labels = (part.repeat_interleave(copies, dim=0) for part in (images.images, images.labels))
    values = log_likelihoods(Pipeline(tokenizer), images, num_draws=50, progress=False)
    weights = (values.bound.view(3, copies) - exact[:, None]).exp()
    error = weights.std(dim=1) / math.sqrt(copies)
    assert ((weights.mean(dim=1) - 1).abs() < 5 * error + 1e-4).all(), (weights.mean(dim=1), error)
    assert (error < 0.2).all()  # the check above says something
    assert (values.elbo <= values.bound + 1e-9).all()
    torch.testing.assert_close(values.elbo, -values.distortion - values.rate)


@pytest.mark.parametrize("name", ["vqvae", "vqvae2"])
@pytest.mark.parametrize("quantizer", sorted(set(tiny.QUANTIZERS) - {"gumbel"}))
def test_deterministic_encoders_are_drawn_from_once(name, quantizer):
    options = {**tiny.TOKENIZERS[name], "quantizer": {"type": quantizer, **tiny.QUANTIZERS[quantizer]}}
    options.pop("codebook_sizes", None)
    tokenizer = build_tokenizer({"type": name, **options}).eval()
    images = BinaryImages((3, 8, 8))
    draw = tokenizer.draw_posterior(images.images)
    assert not tokenizer.is_stochastic
    assert (draw.log_q == 0).all()
    assert all(map(torch.equal, draw.codes, tokenizer.encode(images.images)))
    torch.testing.assert_close(draw.log_likelihood, -tokenizer.nll(images.images, draw.codes))
    one, many = (evaluate(Pipeline(tokenizer), images, num_draws=k) for k in (1, 100))
    assert one == many
    assert many["num_draws"] == 1
    assert many["nats"] == pytest.approx(many["negative_elbo_nats"])


def test_the_codes_of_gumbel_are_drawn_with_the_probability_that_is_said():
    tokenizer = make_stochastic("vqvae")
    image = BinaryImages((1, 4, 4), 1).images
    draw = tokenizer.draw_posterior(image.expand(20000, -1, -1, -1))
    sequences, counts = tokenizer.spec.flatten(draw.codes).unique(dim=0, return_counts=True)
    for sequence, count in zip(sequences, counts):
        log_q = draw.log_q[(tokenizer.spec.flatten(draw.codes) == sequence).all(dim=1)]
        assert log_q.max() - log_q.min() < 1e-5
        share, q = count.item() / 20000, log_q[0].exp().item()
        assert abs(share - q) < 5 * math.sqrt(q * (1 - q) / 20000)


class Table(Prior):
    """Any distribution over one code; `partition` is what it says of its normalisation."""

    def __init__(self, logits: torch.Tensor, partition: LogPartition | None = None):
        super().__init__(PriorConfig(spec=CodeSpec(((1,),), (len(logits),))))
        self.register_buffer("log_p", logits.log_softmax(dim=0))
        if partition is not None:
            self.log_partition = lambda callback=None: partition

    def log_prob(self, codes, labels=None):
        return self.log_p[codes[0][:, 0]]

    def _sample(self, *arguments):
        raise NotImplementedError


class Mixture(Tokenizer):
    """A mixture of independent binary pixels, p(x) = sum_z p(z) prod_i p(x_i | z), with the encoder of any table.

    Args:
        prior: p(z).
        pixels: (K, 4) probabilities that pixels of a 2x2 image are one.
        encoder: (16, K) logits of q(z | x), x numbered by its bits.
    """

    def __init__(self, prior: Table, pixels: torch.Tensor, encoder: torch.Tensor):
        super().__init__(TokenizerConfig(image_shape=(1, 2, 2)))
        self.spec, self.prior = prior.spec, prior
        self.pixels, self.encoder = torch.nn.Parameter(pixels), torch.nn.Parameter(encoder)

    def log_q(self, images):
        return self.encoder[(images.flatten(1) @ 2.0 ** torch.arange(4)).long()].log_softmax(dim=1)

    def nll(self, images, codes):
        p = self.pixels[codes[0][:, 0]]
        return -torch.where(images.flatten(1) > 0, p, 1 - p).log().sum(dim=1)

    @torch.no_grad()
    def draw_posterior(self, images):
        log_q = self.log_q(images)
        code = torch.multinomial(log_q.exp(), 1)
        return PosteriorDraw((code,), log_q.gather(1, code)[:, 0], -self.nll(images, (code,)))

    def log_joint(self, images) -> torch.Tensor:
        """log p(x, z), (B, K)."""
        codes = torch.arange(len(self.pixels))
        joint = [self.prior.log_p[k] - self.nll(images, (k.expand(len(images), 1),)) for k in codes]
        return torch.stack(joint, dim=1).detach().double()

    def exact(self, images) -> torch.Tensor:
        """log p(x), (B,)."""
        return self.log_joint(images).logsumexp(dim=1)

    def log_posterior(self) -> torch.Tensor:
        """log p(z | x) of all images, (16, K)."""
        return self.log_joint(Repeated(torch.ones(16, dtype=torch.int64)).images).log_softmax(dim=1).float()

    def forward(self, images, step=None):
        raise NotImplementedError

    encode = decode = forward


class Repeated(BinaryImages):
    """The 16 binary images of 2x2 pixels, each as often as asked."""

    def __init__(self, times: torch.Tensor):
        bits = torch.arange(16)[:, None] >> torch.arange(4) & 1
        self.images = bits.float().view(16, 1, 2, 2).repeat_interleave(times, dim=0)
        self.labels = torch.zeros(len(self.images), dtype=torch.int64)


def make_mixture(encoder: torch.Tensor | None = None, partition: LogPartition | None = None) -> Mixture:
    generator = torch.Generator().manual_seed(3)
    prior = Table(torch.randn(3, generator=generator), partition)
    pixels = torch.rand(3, 4, generator=generator) * 0.9 + 0.05
    return Mixture(prior, pixels, torch.randn(16, 3, generator=generator) if encoder is None else encoder)


def enumerated_bound(mixture: Mixture, images: torch.Tensor, k: int) -> torch.Tensor:
    """E log mean w over all K^k combinations of draws, for each image."""
    log_q = mixture.log_q(images).detach().double()
    log_w = mixture.log_joint(images) - log_q
    total = 0
    for drawn in itertools.product(range(3), repeat=k):
        drawn = list(drawn)
        total += log_q[:, drawn].sum(dim=1).exp() * (log_w[:, drawn].logsumexp(dim=1) - math.log(k))
    return total


@pytest.mark.parametrize("k", [1, 2, 4])
def test_the_bound_of_k_draws_has_its_enumerated_expectation(k):
    mixture, copies = make_mixture(), 400
    images = Repeated(torch.full((16,), copies))
    values = log_likelihoods(Pipeline(mixture), images, num_draws=k, batch_size=2000, progress=False)
    expected = enumerated_bound(mixture, images.images[::copies], k)
    bounds = values.bound.view(16, copies)
    error = bounds.std(dim=1) / math.sqrt(copies)
    assert ((bounds.mean(dim=1) - expected).abs() < 5 * error + 1e-6).all()
    elbo = values.elbo.view(16, copies)
    error = elbo.std(dim=1) / math.sqrt(copies)
    assert ((elbo.mean(dim=1) - enumerated_bound(mixture, images.images[::copies], 1)).abs() < 5 * error + 1e-6).all()


def test_the_bound_grows_with_the_draws_and_ends_at_log_p_of_x():
    mixture, images = make_mixture(), Repeated(torch.full((16,), 50))
    exact = -mixture.exact(images.images).mean().item()
    nats = [evaluate(Pipeline(mixture), images, num_draws=k, batch_size=800)["nats"] for k in (1, 5, 50, 500)]
    assert nats == sorted(nats, reverse=True)
    assert nats[0] > exact + 0.05
    assert nats[-1] == pytest.approx(exact, abs=0.02)


def test_the_mean_of_a_mixture_of_known_entropy_lies_within_its_error_bar():
    """Images drawn from the model itself have -E log p(x) = its entropy."""
    mixture = make_mixture(encoder=make_mixture().log_posterior() / 2)  # not the true one
    p = mixture.exact(Repeated(torch.ones(16, dtype=torch.int64)).images).exp()
    assert p.sum().item() == pytest.approx(1, abs=1e-6)
    entropy = torch.special.entr(p).sum().item()
    generator = torch.Generator().manual_seed(5)
    drawn = torch.multinomial(p, 3000, replacement=True, generator=generator)
    result = evaluate(Pipeline(mixture), Repeated(drawn.bincount(minlength=16)), num_draws=100, batch_size=3000)
    assert abs(result["nats"] - entropy) < 3 * result["nats_se"]
    assert result["nats_se"] < 0.02
    assert result["bits_per_dim"] == pytest.approx(result["nats"] / 4 / math.log(2))
    assert abs(result["bits_per_dim"] - entropy / 4 / math.log(2)) < 3 * result["bits_per_dim_se"]


def test_the_true_posterior_makes_any_number_of_draws_exact():
    mixture, images = make_mixture(encoder=make_mixture().log_posterior()), Repeated(torch.ones(16, dtype=torch.int64))
    values = log_likelihoods(Pipeline(mixture), images, num_draws=2, progress=False)
    torch.testing.assert_close(values.bound, mixture.exact(images.images), rtol=0, atol=1e-5)
    torch.testing.assert_close(values.elbo, values.bound, rtol=0, atol=1e-5)


def test_the_same_seed_gives_the_same_numbers_and_leaves_the_global_generator_alone():
    pipeline, images = Pipeline(make_mixture()), Repeated(torch.full((16,), 3))
    before = torch.get_rng_state()
    first = evaluate(pipeline, images, num_draws=3, seed=1)
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(5)
    assert evaluate(pipeline, images, num_draws=3, seed=1) == first
    assert evaluate(pipeline, images, num_draws=3, seed=2)["nats"] != first["nats"]


# log Z
# ------------------------------------------------------------------------------------------------


def test_a_likelihood_is_refused_where_the_estimates_of_log_z_disagree():
    for upper, agree in ((1.09, True), (1.11, False), (0.89, False)):
        partition = LogPartition(1.0, upper, 0.02, 50.0, exact=False)
        pipeline, images = Pipeline(make_mixture(partition=partition)), Repeated(torch.ones(16, dtype=torch.int64))
        if agree:
            assert math.isfinite(evaluate(pipeline, images)["nats"])
        else:
            with pytest.raises(NotMeasurableError, match="log Z is not known well enough for a likelihood"):
                evaluate(pipeline, images)
        measured = log_partition_metrics(pipeline.prior)  # reported either way
        assert measured["log_partition_lower"] == 1.0
        assert measured["log_partition_upper"] == upper
        assert measured["log_partition_se"] == 0.02
        assert measured["log_partition_ess"] == 50.0


def test_an_exact_log_z_has_no_error_bar_and_other_priors_have_none_at_all():
    prior = build_prior({"type": "rbm", **tiny.PRIORS["rbm"], "spec": tiny.SPECS["bits"]})
    assert log_partition_metrics(prior) == {"log_partition": pytest.approx(4 * math.log(2))}
    assert log_partition_metrics(make("gpt").prior) == {}


def test_the_sizes_of_an_estimate_of_log_z_are_set_where_one_is_made():
    prior = build_prior({"type": "rbm", **tiny.PRIORS["rbm"], "spec": CodeSpec(((34,),), (2,))})
    set_ais_sizes(prior, ais_temperatures=None, ais_chains=9)
    assert (prior.ais_temperatures, prior.ais_chains) == (prior.config.ais_temperatures, 9)
    with pytest.raises(ValueError, match="ais_temperatures must be at least 2, got 1"):
        set_ais_sizes(prior, ais_temperatures=1)


@pytest.mark.parametrize("name", ["rbm", "bernoulli", "gpt"])
def test_no_sizes_are_set_where_log_z_is_not_estimated(name):
    prior = build_prior({"type": name, **tiny.PRIORS[name], "spec": tiny.SPECS["bits"]})
    set_ais_sizes(prior, ais_temperatures=None, ais_chains=None)
    with pytest.raises(
        ValueError, match=f"ais_chains set the size of an estimate of log Z, and this {type(prior).__name__} makes none"
    ):
        set_ais_sizes(prior, ais_chains=9)
