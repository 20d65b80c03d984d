"""One code at a time through a PixelCNN: windows of any size, autocast, dropout."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from prior.base import CodeSpec
from prior.pixelcnn import PixelCNN, PixelCNNConfig


def make(shapes: tuple, dropout: float = 0.0, kernel_size: int = 3) -> PixelCNN:
    torch.manual_seed(0)
    spec = CodeSpec(shapes, (5,) * len(shapes))
    sizes = {"hidden_dim": 6, "num_layers": 3, "kernel_size": kernel_size, "dropout": dropout}
    return PixelCNN(PixelCNNConfig(spec=spec, num_classes=3, **sizes)).eval()


def codes_of(prior: PixelCNN, batch: int) -> tuple[torch.Tensor, ...]:
    return tuple(torch.randint(5, (batch, *shape)) for shape in prior.spec.shapes)


@torch.no_grad()
def by_steps(prior: PixelCNN, codes: tuple[torch.Tensor, ...], classes: torch.Tensor) -> torch.Tensor:
    """(B, N, K): the logits of every code, given those before it."""
    steps, sent, logits = prior.steps(classes), None, []
    for code in prior.spec.flatten(codes).unbind(dim=1):
        logits.append(steps.send(sent).clone())
        sent = code
    return torch.stack(logits, dim=1)


@settings(max_examples=40)
@given(
    shape=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    kernel_size=st.sampled_from([3, 5, 7]),
    batch=st.integers(1, 3),
)
def test_steps_give_the_logits_of_the_whole_pass(shape, kernel_size, batch):
    prior, classes = make((shape, (2, 3)), kernel_size=kernel_size), torch.arange(batch)
    codes = codes_of(prior, batch)
    with torch.no_grad():
        expected = torch.cat(prior.logits(codes, classes), dim=1)
    torch.testing.assert_close(by_steps(prior, codes, classes), expected, atol=1e-5, rtol=1e-4)


def test_steps_work_under_autocast():
    prior, classes = make(((2, 2), (3, 3))), torch.arange(2)
    codes = codes_of(prior, 2)
    expected = by_steps(prior, codes, classes)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = by_steps(prior, codes, classes)
    torch.testing.assert_close(found.float(), expected, atol=0.05, rtol=0.05)  # 8 bits of mantissa
    assert not torch.equal(found.float(), expected)


@pytest.mark.parametrize("training", [False, True])
def test_dropout_acts_on_steps_in_training_only(training):
    prior, classes = make(((2, 2),), dropout=0.5).train(training), torch.arange(2)
    codes = codes_of(prior, 2)
    assert torch.equal(by_steps(prior, codes, classes), by_steps(prior, codes, classes)) != training
