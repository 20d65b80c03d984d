"""The bound on log p(x), against enumeration of all codes."""

import itertools
import math

import pytest
import torch

from pipelines import Pipeline
from pipelines.checkpoint import build_prior, build_tokenizer, fingerprint
from pipelines.evaluation import evaluate_pipeline
from pipelines.likelihood import evaluate_likelihood, prior_log_prob, standard_error
from prior import PRIORS
from tests import tiny
from tokenizer.likelihoods import LIKELIHOODS

NUM_CLASSES = 3


class BinaryImages:
    """Images of two values, which every likelihood takes, with labels."""

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
    """A tokenizer with 4 codes of 3 values: 81 latents in all."""
    config = {
        **tiny.TOKENIZERS["vqvae"],
        "image_shape": (1, 4, 4),
        "downsample_factor": 2,
        "quantizer": {"type": "vq", "codebook_size": 3, "code_dim": 4},
        "likelihood": {"type": likelihood, **tiny.LIKELIHOODS[likelihood]},
    }
    tokenizer = build_tokenizer({"type": "vqvae", **config})
    tokenizer.initialize(BinaryImages((1, 4, 4)).images)
    if prior is None:
        return Pipeline(tokenizer)
    implied = {"spec": tokenizer.spec, "num_classes": num_classes, "tokenizer_fingerprint": fingerprint(tokenizer)}
    return Pipeline(tokenizer, build_prior({"type": prior, **tiny.PRIORS[prior], **implied}))


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
        index = sum(code.item() * 3 ** (3 - place) for place, code in enumerate(sequence))
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


def test_a_pipeline_is_evaluated_by_what_it_reconstructs():
    pipeline, images = make("gpt", NUM_CLASSES), BinaryImages((1, 4, 4))
    result = evaluate_pipeline(pipeline, images, batch_size=3)
    reconstructions = pipeline.reconstruct(images.images, output_type="pt")
    mse = (reconstructions - images.images).square().flatten(1).mean(1)
    codes = pipeline.encode(images.images)[0]
    assert result["mse"] == pytest.approx(mse.mean().item())
    assert result["psnr"] == pytest.approx((-10 * mse.log10()).mean().item())
    assert result["codebook_usage"] == pytest.approx(len(codes.unique()) / 3)
    assert result["uniform_nats_per_code"] == pytest.approx(math.log(3))
    assert result["nats"] == pytest.approx(evaluate(pipeline, images)["nats"])
