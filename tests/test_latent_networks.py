"""Batch norm of the fully connected networks: torch's own on one process, that of the whole batch on several."""

from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tokenizer.latent_networks.mlp import MLP, BatchNorm

BATCH_SIZES = (8, 8, 8, 2)  # over all processes: of the last, two hold one row each


class Autoencoder(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.network = MLP((1, 3, 3), [4, 2], 1, 1, hidden_dim=5, num_layers=2)

    def forward(self, images: Tensor) -> Tensor:
        features = self.network.features(images)
        first = self.network.infer(features, 0, [])
        latents = torch.cat([first, self.network.infer(features, 1, [first])], dim=1)
        return (self.network.decode(latents, None, torch.randn_like).params - images).square().mean()


def train(rank: int = 0, num_processes: int = 1) -> dict[str, Tensor]:
    module = Autoencoder()
    for step, size in enumerate(BATCH_SIZES):
        images = torch.rand(size, 1, 3, 3, generator=torch.Generator().manual_seed(step))
        images[size // 2 :] += 3  # the moments of a part are not those of the whole
        loss = module(images.chunk(num_processes)[rank])
        gradients = torch.autograd.grad(loss, list(module.parameters()))
        for parameter, gradient in zip(module.parameters(), gradients):
            if num_processes > 1:  # as DDP does
                dist.all_reduce(gradient)
            # plain descent: Adam would make much of rounding in the gradients that batch norm makes zero
            parameter.data -= 0.3 * gradient / num_processes
    return module.state_dict()


def train_on_one_of_two(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    store, patience = f"file://{folder}/store", timedelta(seconds=20)
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2, timeout=patience)
    save_file(train(rank, num_processes=2), folder / f"{rank}.safetensors")
    dist.destroy_process_group()


def test_two_processes_are_one_with_the_whole_batch(tmp_path):
    mp.start_processes(train_on_one_of_two, (tmp_path,), nprocs=2, start_method="fork")
    first, second = (load_file(tmp_path / f"{rank}.safetensors") for rank in (0, 1))
    for name, expected in train().items():
        assert torch.equal(first[name], second[name]), name
        torch.testing.assert_close(first[name], expected, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("training", [True, False])
def test_one_process_has_the_batch_norm_of_torch_to_the_last_bit(training):
    ours, theirs = (kind(5, eps=1e-2, momentum=0.2).train(training) for kind in (BatchNorm, nn.BatchNorm1d))
    rows = torch.randn(7, 5)
    assert torch.equal(ours(rows), theirs(rows))
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert all(torch.equal(value, theirs.state_dict()[name]) for name, value in ours.state_dict().items())


def test_a_step_that_overflows_leaves_the_running_moments_as_they_are():
    normalise = BatchNorm(5)
    normalise(torch.randn(7, 5))
    before = normalise.running_mean.clone(), normalise.running_var.clone()
    rows = torch.randn(7, 5)
    rows[2, 3] = torch.inf
    assert not normalise(rows).isfinite().all()
    assert all(map(torch.equal, before, (normalise.running_mean, normalise.running_var)))
    normalise(torch.randn(7, 5))
    assert not torch.equal(normalise.running_mean, before[0])


def test_one_row_has_no_variance_to_train_by():
    normalise = BatchNorm(5)
    message = "at least 2 rows to train, got 1; raise training.batch_size or lower training.gradient_accumulation_steps"
    with pytest.raises(ValueError, match=message):
        normalise(torch.ones(1, 5))
    assert normalise.eval()(torch.ones(1, 5)).isfinite().all()
