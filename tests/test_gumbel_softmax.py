"""The Gumbel-softmax autoencoder and its factorial prior, against the enumeration of all codes."""

import itertools
import math

import pytest
import torch
from torch import Tensor

from pipelines.checkpoint import build_tokenizer
from prior.base import PriorConfig
from prior.bernoulli import Bernoulli
from prior.bits import BitPriorConfig
from prior.factorial import Factorial
from tests import tiny

SIZES = {"num_groups": 2, "latents_per_group": 1, "num_categories": 3, "image_shape": (1, 2, 3)}  # 9 codes


def make(**options):
    """A model whose weights are far from where they start: codes matter, and depend on the image and on each other."""
    torch.manual_seed(0)
    model = build_tokenizer({"type": "gumbel_softmax", **tiny.TOKENIZERS["gumbel_softmax"], **SIZES, **options})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.7 * torch.randn_like(parameter)
    return model.eval()


def seed(number: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(number)


def some_images(count: int = 3) -> Tensor:
    return (torch.rand(count, 1, 2, 3, generator=seed()) < 0.5).float()


def all_codes() -> Tensor:
    return torch.tensor(list(itertools.product(range(3), repeat=2)))


@torch.no_grad()
def log_q(model, images: Tensor) -> Tensor:
    """log q of all nine codes, (B, 9), from the definition: the second group given the first one."""
    features = model.features(images)
    first = model.network.infer(features, 0, []).log_softmax(1)
    columns = []
    for a, b in all_codes().tolist():
        one_hot = torch.eye(3)[a].expand(len(images), 3)
        second = model.network.infer(features, 1, [one_hot]).log_softmax(1)
        columns.append(first[:, a] + second[:, b])
    return torch.stack(columns, dim=1)


@torch.no_grad()
def log_joint(model, images: Tensor) -> Tensor:
    """log p(x, c) of all nine codes, (B, 9)."""
    columns = []
    for code in all_codes():
        codes = (code.expand(len(images), 2),)
        columns.append(model.prior.log_prob(codes) - model.nll(images, codes))
    return torch.stack(columns, dim=1)


def test_draws_come_with_their_probability_and_as_often_as_it_says():
    torch.manual_seed(1)
    model, images = make(), some_images()
    draw = model.draw_posterior(images.repeat(5000, 1, 1, 1))
    index = (draw.codes[0] * torch.tensor([3, 1])).sum(1).view(5000, 3)
    expected = log_q(model, images)
    torch.testing.assert_close(draw.log_q.view(5000, 3), expected.gather(1, index.T).T, rtol=1e-5, atol=1e-5)
    frequencies = torch.stack([column.bincount(minlength=9) / 5000 for column in index.T])
    torch.testing.assert_close(frequencies, expected.exp(), rtol=0, atol=0.03)
    assert expected.exp().amax() < 0.95


def test_weights_are_those_of_the_discrete_model():
    torch.manual_seed(1)
    model, images = make(), some_images()
    draw = model.draw_posterior(images.repeat(200, 1, 1, 1))
    weights = (draw.log_likelihood + model.log_prior(draw.codes) - draw.log_q).view(200, 3)
    index = (draw.codes[0] * torch.tensor([3, 1])).sum(1).view(200, 3).T
    expected = (log_joint(model, images) - log_q(model, images)).gather(1, index).T
    torch.testing.assert_close(weights, expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("straight_through", [False, True])
def test_at_a_low_temperature_the_training_loss_is_the_bound(straight_through):
    torch.manual_seed(1)
    model = make(temperature_start=1e-3, temperature_end=1e-3, weight_decay=0.0, straight_through=straight_through)
    images = some_images()
    q = log_q(model, images)
    expected = (q.exp() * (q - log_joint(model, images))).sum(1).mean().item()
    model.training = True  # its own, not that of its networks, whose batch statistics would be another model's
    losses = model(images.repeat(8000, 1, 1, 1)).losses
    assert sum(losses.values()).item() == pytest.approx(expected, abs=0.05)
    assert set(losses) == {"reconstruction", "kl", "weight_decay"}


def test_the_divergence_is_that_of_enumeration_and_warms_up():
    model, images = make(num_groups=1, kl_warmup_steps=4), some_images()
    with torch.no_grad():
        model.prior.logits[0].copy_(torch.tensor([[[1.0, -1.0, 0.5]]]))
        q = model.network.infer(model.features(images), 0, []).softmax(1)
    p = torch.tensor([1.0, -1.0, 0.5]).softmax(0)
    expected = (q * (q / p).log()).sum(1).mean().item()
    model.training = True
    assert [model(images, step).losses["kl"].item() for step in (0, 1, 3, 9)] == pytest.approx(
        [expected / 4, expected / 2, expected, expected], rel=1e-4
    )


def test_the_temperature_falls_to_its_end():
    model = make(temperature_start=1.0, temperature_end=0.5, temperature_decay=1e-3)
    steps = (0, 100, 693, 10**6, None)
    assert [model.temperature(step) for step in steps] == pytest.approx(
        [1.0, math.exp(-0.1), math.exp(-0.693), 0.5, 0.5]
    )


def test_straight_through_decodes_one_hot_vectors_and_reaches_the_encoder():
    seen = []
    for straight_through in (False, True):
        model = make(straight_through=straight_through).train()
        model.network.decoder.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].detach()))
        model(some_images(), 0).losses["reconstruction"].backward()
        assert all(p.grad.abs().sum() > 0 for p in model.network.encoders[1].parameters() if p.ndim > 1)
    relaxed, hard = (latents.view(3, 2, 3) for latents in seen)
    torch.testing.assert_close(relaxed.sum(2), torch.ones(3, 2))
    assert not ((relaxed == 0) | (relaxed == 1)).all()
    assert ((hard == 0) | (hard == 1)).all()
    assert (hard.sum(2) == 1).all()


def test_codes_are_the_most_probable_categories():
    model, images = make(num_groups=1, latents_per_group=2), some_images()
    logits = model.network.infer(model.features(images), 0, []).view(3, 2, 3)
    assert torch.equal(model.encode(images)[0], logits.argmax(2))


def test_several_draws_are_averaged():
    torch.manual_seed(1)
    model = make(num_draws=3).train()
    out = model(some_images(2), 0)
    assert out.images.shape == (2, 1, 2, 3)
    assert out.codes[0].shape == (2, 2)


def test_collapse_is_said_by_group():
    model = make(num_groups=2).train()
    with torch.no_grad():
        for parameter in [*model.network.encoders[1].parameters(), *model.prior.parameters()]:
            parameter.zero_()  # the second group is uniform, whatever the image
    model(some_images(8), 0)
    assert list(model.complaints()) == ["collapse of categoricals of group 1"]
    assert "0 nats per image in 1 latents" in model.complaints()["collapse of categoricals of group 1"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_groups": 0}, "num_groups must be at least 1, got 0"),
        ({"latents_per_group": 0}, "latents_per_group must be at least 1, got 0"),
        ({"num_categories": 1}, "num_categories must be at least 2, got 1"),
        ({"temperature_start": 0.4}, "temperature_start = 0.4 and temperature_end = 0.5"),
        ({"temperature_end": 0.0}, "temperatures must be greater than 0"),
        ({"temperature_decay": -1.0}, "temperature_decay must be at least 0, got -1.0"),
        ({"prior": {"type": "rbm"}}, "unknown prior 'rbm'"),
    ],
)
def test_settings_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        make(**options)


# The prior
# ------------------------------------------------------------------------------------------------


def test_over_bits_it_is_the_bernoulli_prior():
    spec = tiny.SPECS["bits"]
    factorial, bernoulli = Factorial(PriorConfig(spec=spec)), Bernoulli(BitPriorConfig(spec=spec))
    log_odds = torch.tensor([0.3, -1.0, 2.0, 0.0])
    with torch.no_grad():
        factorial.logits[0][0, :, 1] = log_odds
        bernoulli.left_bias.copy_(log_odds[:2])
        bernoulli.right_bias.copy_(log_odds[2:])
    codes = (torch.tensor(list(itertools.product(range(2), repeat=4))),)
    torch.testing.assert_close(factorial.log_prob(codes), bernoulli.log_prob(codes))


def test_it_learns_how_often_each_code_occurs_at_its_place():
    prior = Factorial(PriorConfig(spec=tiny.SPECS["levels"], num_classes=2))
    labels = torch.arange(400) % 2
    codes = tuple(
        torch.randint(k, (400, *shape), generator=seed()) * labels.view(-1, *[1] * len(shape))
        for shape, k in zip(prior.spec.shapes, prior.spec.vocab_sizes)
    )
    optimizer = torch.optim.Adam(prior.parameters(), lr=0.1)
    for _ in range(200):
        optimizer.zero_grad()
        prior(codes, labels)["nll"].backward()
        optimizer.step()
    counts = codes[0][labels == 1].flatten().bincount(minlength=3) / 200
    torch.testing.assert_close(prior.logits[0].softmax(2)[1, 0], counts, rtol=0, atol=0.01)
    assert prior.logits[0].softmax(2)[0, 0, 0] > 0.98
