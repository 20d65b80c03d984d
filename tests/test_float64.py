"""Devices without float64, such as Apple's GPUs: here a fake one, on which float64 is refused. Fake tensors of a GPU
need a build of torch for one, if no GPU.
"""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pipelines.evaluation.reconstruction import ssim
from prior import float64
from prior.annealed_importance import annealed_log_weights
from prior.boltzmann_samplers import Boltzmann, reweight_population

DEVICE = "cuda"
needs_build = pytest.mark.skipif(not torch.backends.cuda.is_built(), reason="torch was built for CPUs alone")


class NoFloat64(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.device.type == DEVICE:
                assert tensor.dtype != torch.float64, f"{function} makes float64"
        return result


def random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, device=DEVICE)


def machines(count: int) -> list[Boltzmann]:
    return [Boltzmann(random(4, 5), random(4), random(5)) for _ in range(count)]


@pytest.fixture
def device(monkeypatch):
    """For fake tensors, which have shapes and devices and no values."""
    monkeypatch.setattr(float64, "WITHOUT", (DEVICE,))
    with FakeTensorMode(), NoFloat64():
        yield


def test_float64_is_made_where_it_can_be():
    assert float64.float64_device(torch.device("mps")) == torch.device("cpu")
    assert float64.float64_device(torch.device("cuda", 1)) == torch.device("cuda", 1)
    assert float64.in_float64(torch.ones(2)).dtype == torch.float64


@needs_build
@pytest.mark.usefixtures("device")
def test_chains_stay_where_they_are_and_weights_go_where_float64_is():
    left, right, change = reweight_population(random(7, 4), random(7, 5), *machines(2))
    assert (left.device.type, right.device.type, change.device.type) == (DEVICE, DEVICE, "cpu")
    (model,) = machines(1)
    weights = annealed_log_weights(model, model.left_bias, model.right_bias, random(7, 4), [0.0, 0.5, 1.0])
    assert (weights.device.type, weights.dtype, weights.shape) == ("cpu", torch.float64, (7,))


@needs_build
@pytest.mark.usefixtures("device")
def test_images_are_compared_on_devices_without_float64():
    assert ssim(random(2, 1, 16, 16), random(2, 1, 16, 16)).shape == (2,)
