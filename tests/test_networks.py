"""What the networks of VQGAN compute when they are compiled for a GPU is what they compute elsewhere."""

import pytest
import torch
from torch import nn

from tokenizer.networks import resnet
from tokenizer.networks.resnet import ResNet, _GroupNorm, _Upsample


def gradients(function, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
    output = function(inputs[0])
    weights = torch.linspace(-1, 2, output.numel()).view(output.shape)
    return [output, *torch.autograd.grad((output * weights).sum(), inputs)]


@pytest.mark.parametrize("mean", [0.0, 100.0])
def test_a_group_norm_by_channels_is_the_group_norm(mean):
    norm = _GroupNorm(3, 12, eps=1e-6)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    scales = torch.logspace(-1, 1, 12)[:, None, None]  # channels of a group differ
    x = (mean + scales * torch.randn(2, 12, 5, 4)).requires_grad_()
    inputs = [x, norm.weight, norm.bias]
    exact = nn.GroupNorm(3, 12, eps=1e-6).double()
    exact.load_state_dict(norm.state_dict())
    expected = gradients(exact, [x.detach().double().requires_grad_(), exact.weight, exact.bias])
    errors, torchs = (
        [(one - other).abs().max().item() for one, other in zip(gradients(function, inputs), expected)]
        for function in (norm.by_channel, norm)
    )
    assert all(error <= 4 * own + 1e-5 for error, own in zip(errors, torchs))


def test_repetition_is_the_nearest_upsampling():
    layer, x = _Upsample(scale_factor=2), torch.randn(2, 3, 4, 5, requires_grad=True)
    (up, up_gradient), (repeated, gradient) = gradients(layer, [x]), gradients(layer.by_repetition, [x])
    assert torch.equal(repeated, up)
    torch.testing.assert_close(gradient, up_gradient)


def test_maps_keep_their_layout_through_a_whole_network(monkeypatch):
    sizes = {"hidden_dim": 8, "dim_multipliers": (1, 2), "num_residual_blocks": 1, "num_groups": 4}
    network = ResNet(**sizes)
    model = nn.Sequential(network.encoder(3, 6, 4), network.decoder(6, 3, 4)).to(memory_format=torch.channels_last)
    images = torch.rand(2, 3, 16, 16).to(memory_format=torch.channels_last).requires_grad_()
    expected = gradients(model, [images, *model.parameters()])

    def laid_out(layer, inputs, output):
        for x in (*inputs, output):
            assert x.is_contiguous(memory_format=torch.channels_last)

    for layer in model.modules():
        if isinstance(layer, (nn.Conv2d, nn.GroupNorm, nn.Upsample)):
            layer.register_forward_hook(laid_out)
    monkeypatch.setattr(resnet, "_lays_out", lambda x: True)
    for found, one in zip(gradients(model, [images, *model.parameters()]), expected):
        torch.testing.assert_close(found, one, rtol=1e-3, atol=1e-3 * one.abs().max().item())


def test_only_what_is_compiled_for_a_gpu_is_written_out():
    assert not resnet._lays_out(torch.ones(1))
    assert not resnet._lays_out(torch.ones(1, device="meta"))
