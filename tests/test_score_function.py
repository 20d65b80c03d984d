"""The running baseline of score-function estimators; their gradients are checked in test_binary_vae.py."""

import copy

import pytest
import torch
from torch import Tensor

from pipelines.checkpoint import build_tokenizer
from tests import tiny


@pytest.mark.parametrize("name", ["nvil", "reinforce"])
def test_the_baseline_follows_all_micro_batches_of_a_step(name):
    model = build_tokenizer({"type": name, **tiny.TOKENIZERS[name], "baseline_decay": 0.0}).train()
    images = torch.stack([torch.rand(8, 3, 8, 8).round(), torch.zeros(8, 3, 8, 8)])

    def moments(*micro_batches: int) -> Tensor:
        """Mean and mean square of the signal in a step."""
        twin = copy.deepcopy(model)
        for micro_batch in micro_batches:
            torch.manual_seed(micro_batch)  # equal draws of bits
            twin(images[micro_batch])
        twin.after_step()
        return torch.stack([twin.signal_mean, twin.signal_variance + twin.signal_mean.square()])

    assert (moments(0) - moments(1)).abs().min() > 1
    torch.testing.assert_close(moments(0, 1), (moments(0) + moments(1)) / 2)


@pytest.mark.parametrize("name", ["nvil", "reinforce"])
def test_mean_and_variance_are_of_the_signal_less_what_the_baseline_network_predicts(name):
    model = build_tokenizer({"type": name, **tiny.TOKENIZERS[name], "baseline_decay": 0.0}).train()
    images = torch.stack([torch.ones(3, 8, 8), torch.zeros(3, 8, 8)]).repeat(4, 1, 1, 1)
    signals = []
    bound = model.draw

    def draw(*arguments, **options):
        log_weights, *others = bound(*arguments, **options)
        signals.append(log_weights.detach())
        return log_weights, *others

    model.draw = draw
    with torch.no_grad():
        predicted = torch.tensor([50.0, -50.0]).repeat(4)
        model.baseline = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 1, bias=False))
        model.mean_image.fill_(0.5)
        model.baseline[1].weight.fill_(100 / 192)
    model(images)
    model.after_step()
    remaining = signals[0] - predicted
    torch.testing.assert_close(model.signal_mean, remaining.mean())
    torch.testing.assert_close(model.signal_variance, remaining.var(correction=0))
