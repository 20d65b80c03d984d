"""Objectives that look at the batch as a whole, on two real processes: the gradient is that of the whole batch."""

from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from safetensors.torch import load_file, save_file
from torch import Tensor

from tokenizer import TOKENIZERS
from tokenizer.latent_networks import LocalGroup
from tokenizer.latent_vae import balanced_kl

FREE_NATS = 1.0


def images() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    brightness = torch.rand(8, 1, 1, 1, generator=generator)
    return (torch.rand(8, 1, 8, 8, generator=generator) < brightness).float()


def free_nats_gradients(part: slice) -> dict[str, Tensor]:
    """Of the KL term of part of the images; analytic, so nothing is drawn."""
    torch.manual_seed(0)
    network = {"type": "mlp", "num_layers": 0}
    options = {"image_shape": (1, 8, 8), "latent_dim": 4, "free_nats": FREE_NATS, "network": network}
    model = TOKENIZERS["gaussian_vae"](TOKENIZERS["gaussian_vae"].Config(**options)).train()
    output = model(images()[part])
    names, encoder = zip(*model.network.encoders.named_parameters())
    return {"loss": output.losses["kl"].detach()} | dict(zip(names, torch.autograd.grad(output.losses["kl"], encoder)))


def balanced_gradients(part: slice) -> dict[str, Tensor]:
    scales = torch.linspace(0.1, 2, 16).view(8, 2)[part].requires_grad_()
    local = {str(i): LocalGroup(scales[:, i].square(), -scales[:, i].square(), 3 + i) for i in range(2)}
    loss = balanced_kl(local, 0.5).mean()
    return {"balanced": loss.detach(), "balanced_gradient": torch.autograd.grad(loss, scales)[0]}


def on_one_of_two(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    store, patience = f"file://{folder}/store", timedelta(seconds=20)
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2, timeout=patience)
    part = slice(4 * rank, 4 * rank + 4)
    found = free_nats_gradients(part) | balanced_gradients(part)
    save_file({name: value.contiguous() for name, value in found.items()}, folder / f"{rank}.safetensors")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def halves(tmp_path_factory) -> list[dict[str, Tensor]]:
    folder = tmp_path_factory.mktemp("two_processes")
    mp.start_processes(on_one_of_two, (folder,), nprocs=2, start_method="fork")
    return [load_file(folder / f"{rank}.safetensors") for rank in range(2)]


def test_free_nats_are_those_of_the_whole_batch(halves):
    whole = free_nats_gradients(slice(None))
    average = {name: (halves[0][name] + halves[1][name]) / 2 for name in whole}  # what DDP makes of them
    torch.testing.assert_close(average, whole, rtol=1e-5, atol=1e-6)


def test_local_latents_are_balanced_over_the_whole_batch(halves):
    whole = balanced_gradients(slice(None))
    assert (halves[0]["balanced"] + halves[1]["balanced"]).item() / 2 == pytest.approx(whole["balanced"].item())
    gradient = torch.cat([half["balanced_gradient"] for half in halves]) / 2
    torch.testing.assert_close(gradient, whole["balanced_gradient"])


def test_some_latents_are_free_in_a_part_alone():
    """Else the first law above would hold without anything that processes tell each other."""
    first, second, whole = (free_nats_gradients(part)["loss"] for part in (slice(4), slice(4, 8), slice(None)))
    assert abs((first + second) / 2 - whole) > 1e-3
