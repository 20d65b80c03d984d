"""Rejection sampling against the exact conditional distribution of codes whose score is high enough."""

import numpy as np
import pytest
import torch

from pipelines.rejection import Accepted
from tests.test_completion import all_codes
from tests.test_pipeline import make, seed, seeds


def brightness(images):
    return images.flatten(1).mean(dim=1)


def scores_of_all_codes(pipeline, score=brightness):
    codes = all_codes(pipeline.tokenizer.spec)
    with torch.no_grad():
        probabilities = pipeline.prior.log_prob(codes).double().exp().numpy()
        return codes, score(pipeline.tokenizer.decode(codes)).numpy(), probabilities


def test_what_reaches_a_threshold_follows_the_prior_given_that_it_does():
    pipeline, n = make(), 600
    _, scores, p = scores_of_all_codes(pipeline)
    threshold = float(np.sort(scores)[::-1][60])  # few of the 625 images
    expected = p * (scores >= threshold)
    accepted = pipeline.rejection_sample(n, score=brightness, threshold=threshold, generator=seed(), max_draws=10_000,
                                         output_type="pt", batch_size=2000)  # fmt: skip
    assert accepted.scores.min() >= threshold - 1e-6
    torch.testing.assert_close(brightness(accepted.images), accepted.scores)
    rate = expected.sum()
    # five standard deviations of a binomial count
    assert accepted.acceptance_rate == pytest.approx(rate, abs=5 * np.sqrt(rate * (1 - rate) / accepted.num_draws))
    assert accepted.acceptance_rate == n / accepted.num_draws
    # an image's score tells which code it is
    places = np.abs(accepted.scores.numpy()[:, None] - np.where(expected > 0, scores, np.inf)[None]).argmin(axis=1)
    measured, expected = np.bincount(places, minlength=len(p)) / n, expected / rate
    assert (np.abs(measured - expected) <= 5 * np.sqrt(expected * (1 - expected) / n) + 1 / n).all()


def test_what_reaches_a_threshold_follows_the_classes_of_the_model_too():
    """Plain draws of a class and of codes given it, looked at once and for all; not one class until it succeeds."""
    pipeline, n = make("vqvae", "factorial", 3), 600
    codes = all_codes(pipeline.tokenizer.spec)
    with torch.no_grad():
        pipeline.prior.logits[0] *= 5  # classes that differ
        scores = brightness(pipeline.tokenizer.decode(codes))
        p = [pipeline.prior.log_prob(codes, torch.full((len(scores),), y)).double().exp() / 3 for y in range(3)]
    threshold = scores.quantile(0.9).item()
    expected = np.array([q[scores >= threshold].sum().item() for q in p])
    assert 3 * expected.min() < expected.max()
    accepted = pipeline.rejection_sample(n, score=brightness, threshold=threshold, generator=seed(), max_draws=10_000,
                                         output_type="pt", batch_size=2000)  # fmt: skip
    rate = expected.sum()
    # five standard deviations of a binomial count
    assert accepted.acceptance_rate == pytest.approx(rate, abs=5 * np.sqrt(rate * (1 - rate) / accepted.num_draws))
    measured, expected = accepted.class_labels.bincount(minlength=3).numpy() / n, expected / rate
    assert (np.abs(measured - expected) <= 5 * np.sqrt(expected * (1 - expected) / n)).all()


def equal(first: Accepted, second: Accepted, rows=slice(None)):
    labels = [None if a.class_labels is None else a.class_labels[rows].tolist() for a in (first, second)]
    return torch.equal(first.scores[rows], second.scores[rows]) and labels[0] == labels[1]


@pytest.mark.parametrize("num_classes", [0, 3])
def test_an_accepted_image_depends_on_its_own_generator_alone(num_classes):
    pipeline = make("vqvae", "gpt", num_classes)
    threshold = brightness(pipeline.sample(64, generator=seed(), output_type="pt")).quantile(0.7).item()
    options = {"score": brightness, "threshold": threshold, "max_draws": 500, "output_type": "pt"}
    together = pipeline.rejection_sample(5, generator=seeds(*range(5)), **options)
    for batch_size in (1, np.int64(3)):
        other = pipeline.rejection_sample(5, generator=seeds(*range(5)), batch_size=batch_size, **options)
        torch.testing.assert_close(other.scores, together.scores)
        assert num_classes == 0 or other.class_labels.equal(together.class_labels)
        assert other.num_draws == together.num_draws  # draws that were made but not looked at do not count
    total = 0
    for i in range(5):
        alone = pipeline.rejection_sample(1, generator=seeds(i), **options)
        torch.testing.assert_close(alone.images, together.images[i : i + 1])
        assert num_classes == 0 or alone.class_labels.equal(together.class_labels[i : i + 1])
        total += alone.num_draws
    assert total == together.num_draws > 5


def recorded(score):
    seen = []

    def function(images):
        seen.append(score(images))
        return seen[-1]

    return function, seen


@pytest.mark.parametrize(("keep_fraction", "num_draws"), [(0.1, 40), (0.3, 14), (1.0, 4)])
@pytest.mark.parametrize("batch_size", [3, 64])
def test_the_best_fraction_of_all_draws_is_kept(keep_fraction, num_draws, batch_size):
    score, seen = recorded(brightness)
    accepted = make().rejection_sample(4, score=score, keep_fraction=keep_fraction, generator=seed(),
                                       batch_size=batch_size, output_type="pt")  # fmt: skip
    draws = torch.cat(seen)
    assert len(draws) == num_draws == accepted.num_draws
    assert accepted.acceptance_rate == 4 / num_draws
    torch.testing.assert_close(accepted.scores, draws.sort(descending=True).values[:4])
    torch.testing.assert_close(brightness(accepted.images), accepted.scores)
    assert accepted.class_labels is None
    assert accepted.indices.tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("batch_size", [5, 64])
def test_the_best_are_chosen_within_each_class(batch_size):
    pipeline = make("vqvae", "gpt", 3)
    labels = ["owl", "cat", "owl", "owl", "dog"]
    options = {"score": brightness, "keep_fraction": 0.25, "output_type": "pt"}
    accepted = pipeline.rejection_sample(
        class_labels=labels, generator=seeds(*range(5)), batch_size=batch_size, **options
    )
    assert accepted.class_labels.tolist() == [2, 0, 2, 2, 1]
    assert accepted.num_draws == 20
    owls = accepted.scores[[0, 2, 3]]
    assert owls.diff().le(0).all()
    alone = pipeline.rejection_sample(class_labels=["owl"] * 3, generator=seeds(0, 2, 3), **options)
    torch.testing.assert_close(alone.scores, owls)
    torch.testing.assert_close(brightness(accepted.images), accepted.scores)


def test_a_classifier_scores_by_the_probability_of_an_images_own_class():
    pipeline = make("vqvae", "gpt", 3)
    weights = 0.3 * torch.randn(3 * 8 * 8, 3)

    def classifier(images):
        return images.flatten(1) @ weights

    accepted = pipeline.rejection_sample(4, class_labels=[0, 1, 2, 1], classifier=classifier, threshold=0.01,
                                         generator=seed(), output_type="pt")  # fmt: skip
    own = classifier(accepted.images).softmax(dim=1)[range(4), accepted.class_labels]
    torch.testing.assert_close(accepted.scores, own)
    assert accepted.class_labels.tolist() == [0, 1, 2, 1]
    with pytest.raises(ValueError, match="but this prior has no classes; give a score"):
        make().rejection_sample(1, classifier=classifier, threshold=0.5)
    with pytest.raises(ValueError, match=r"logits of shape \(1, number of classes\) for 1 images, got \(1, 2\)"):
        pipeline.rejection_sample(1, class_labels=2, classifier=lambda x: classifier(x)[:, :2], threshold=0.5)
    with pytest.raises(ValueError, match=r"got \(1, 6\); the prior has 3 classes"):  # of other data
        pipeline.rejection_sample(1, class_labels=2, classifier=lambda x: classifier(x).repeat(1, 2), threshold=0.5)


@pytest.mark.parametrize("how", [{"threshold": 0.0}, {"keep_fraction": 0.5}], ids=lambda how: next(iter(how)))
def test_what_is_kept_does_not_depend_on_the_default_device_of_new_tensors(how):
    pipeline, options = make(), {"score": brightness, "output_type": "pt", **how}
    plain = pipeline.rejection_sample(3, generator=seeds(0, 1, 2), **options)
    torch.set_default_device("meta")
    try:
        changed = pipeline.rejection_sample(3, generator=seeds(0, 1, 2), **options)
    finally:
        torch.set_default_device(None)
    assert equal(plain, changed)
    assert torch.equal(plain.images, changed.images)


def test_images_that_never_reach_the_threshold_are_left_out_and_said_to_be():
    pipeline = make()
    everything = pipeline.sample(64, generator=seed(), output_type="pt")
    threshold = brightness(everything).quantile(0.8).item()
    with pytest.warns(UserWarning, match=r"only \d+ of 30 images reached threshold = .* within 2 draws each"):
        accepted = pipeline.rejection_sample(30, score=brightness, threshold=threshold, max_draws=2, generator=seed())
    n = len(accepted.images)
    assert 0 < n < 30
    assert len(accepted.scores) == len(accepted.indices) == n
    assert accepted.scores.min() >= threshold
    # each image took one draw or two, and those left out took two
    assert 2 * (30 - n) + n <= accepted.num_draws <= 60
    assert accepted.acceptance_rate == n / accepted.num_draws


def test_a_threshold_out_of_reach_is_an_error_with_the_best_score():
    pipeline = make()
    with pytest.raises(
        ValueError, match=r"none of 12 draws reached threshold = 2: the best score was (0\.\d+)"
    ) as error:
        pipeline.rejection_sample(4, score=brightness, threshold=2.0, max_draws=3, generator=seed())
    score, seen = recorded(brightness)
    with pytest.raises(ValueError, match="none of"):
        pipeline.rejection_sample(4, score=score, threshold=2.0, max_draws=3, generator=seed())
    assert f"{torch.cat(seen).max():.4g}" in str(error.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"threshold": 0.5}, "either a score or a classifier, got none"),
        ({"score": brightness, "classifier": brightness, "threshold": 0.5}, "either a score or a classifier, got both"),
        ({"score": brightness}, "either keep_fraction or threshold, got none"),
        ({"score": brightness, "threshold": 1, "keep_fraction": 1}, "either keep_fraction or threshold, got both"),
        ({"score": brightness, "keep_fraction": 0}, r"keep_fraction must lie in \(0, 1\], got 0"),
        ({"score": brightness, "keep_fraction": 1.5}, r"got 1.5"),
        ({"score": brightness, "keep_fraction": "0.5"}, r"keep_fraction must lie in \(0, 1\], got '0.5'"),
        ({"score": brightness, "threshold": "0.5"}, "threshold must be finite, got '0.5'"),
        ({"score": brightness, "threshold": 0, "max_draws": 2.5}, "max_draws must be an integer, got 2.5"),
        ({"score": brightness, "threshold": float("nan")}, "threshold must be finite, got nan"),
        ({"score": brightness, "threshold": 0, "max_draws": 0}, "max_draws must be at least 1, got 0"),
        ({"score": lambda x: x, "threshold": 0}, r"one finite number for each of 2 images, got \(2, 3, 8, 8\)"),
        ({"score": lambda x: torch.full((2,), torch.nan), "threshold": 0}, "values that are not finite"),
        ({"score": brightness, "threshold": 0, "output_type": "codes"}, "is for sampling"),
        ({"score": brightness, "threshold": 0, "class_labels": 1}, "this prior is unconditional"),
        ({"score": brightness, "threshold": 0, "top_k": 0}, "top_k must be an integer of at least 1"),
    ],
)
def test_wrong_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        make().rejection_sample(2, generator=seed(), **arguments)
