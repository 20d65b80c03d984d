"""Codebooks on two real processes: the same bits on both, and what one process with the whole batch gets."""

from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from safetensors.torch import load_file, save_file
from torch import Tensor

from tokenizer.quantizers import EMAVQ, LFQ, VQ

NUM_STEPS = 12


def make() -> EMAVQ:
    torch.manual_seed(0)
    # Entries die within two or three steps, so revival happens too.
    return EMAVQ(codebook_size=16, code_dim=4, decay=0.4, revive_below=0.1)


def global_batch(step: int) -> Tensor:
    # Wandering data: entries get lost and are revived.
    return torch.randn(10, 4, 3, 2, generator=torch.Generator().manual_seed(step)) + 2 * step


def passes_of(rank: int, step: int) -> list[Tensor]:
    """Micro-batches of three are dealt in turn, as the loop deals them; the last step gives rank 1 nothing."""
    passes = global_batch(step).split(3)
    return passes[rank::2] if step < NUM_STEPS - 1 else passes[: 4 - 4 * rank]


def train(quantizer, steps: list[list[Tensor]]) -> None:
    with torch.no_grad():
        quantizer(global_batch(0))  # what Tokenizer.initialize does: the same images everywhere
    for passes in steps:
        for batch in passes:  # accumulated
            quantizer(batch)
        quantizer.after_step()


def entropy_loss(h: Tensor) -> tuple[Tensor, Tensor]:
    """The entropy loss of a linear encoder's signs, and its gradient for the weights."""
    weight = torch.eye(4).requires_grad_()
    loss = LFQ(num_bits=4)(torch.einsum("bdhw,ed->behw", h + 0.3, weight)).losses["entropy"]
    loss.backward()
    return loss.detach(), weight.grad


def train_on_one_of_two(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    # Processes that disagree on what to do next would wait half an hour by default.
    patience = timedelta(seconds=20)
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2, timeout=patience)
    quantizer = make()
    train(quantizer, [passes_of(rank, step) for step in range(NUM_STEPS)])
    save_file(quantizer.state_dict(), folder / f"averages{rank}.safetensors")
    torch.manual_seed(rank)
    own = VQ(codebook_size=4, code_dim=4)
    own(passes_of(rank, 1)[0])  # initialised from different data
    save_file(own.state_dict(), folder / f"started{rank}.safetensors")
    loss, gradient = entropy_loss(global_batch(0)[5 * rank : 5 * rank + 5])
    save_file({"loss": loss, "gradient": gradient.contiguous()}, folder / f"entropy{rank}.safetensors")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def states(tmp_path_factory) -> Path:
    """Folder of the final states of two processes."""
    folder = tmp_path_factory.mktemp("two_processes")
    mp.start_processes(train_on_one_of_two, (folder,), nprocs=2, start_method="fork")
    return folder


def test_codebooks_are_bit_equal_on_all_processes(states):
    first, second = load_file(states / "averages0.safetensors"), load_file(states / "averages1.safetensors")
    assert first["num_updates"] == NUM_STEPS
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_two_processes_are_one_with_the_whole_batch(states):
    quantizer = make()
    train(quantizer, [[global_batch(step)] for step in range(NUM_STEPS)])
    expected = quantizer.state_dict()
    for name, value in load_file(states / "averages0.safetensors").items():
        torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-5)


def test_entries_were_revived(states):
    never = make()
    never.revive_below = 0.0
    train(never, [[global_batch(step)] for step in range(NUM_STEPS)])
    assert (load_file(states / "averages0.safetensors")["codebook"] - never.codebook).abs().max() > 1


def test_initialisation_is_that_of_the_first_process_everywhere(states):
    first, second = load_file(states / "started0.safetensors"), load_file(states / "started1.safetensors")
    alone = VQ(codebook_size=4, code_dim=4)
    alone(passes_of(0, 1)[0])
    assert torch.equal(first["codebook"], second["codebook"])
    assert torch.equal(first["codebook"], alone.codebook)


def test_the_entropy_of_the_codes_is_that_of_the_whole_batch(states):
    parts = [load_file(states / f"entropy{rank}.safetensors") for rank in range(2)]
    # what DDP makes of the processes' losses and gradients: their average
    average = [(parts[0][name] + parts[1][name]) / 2 for name in ("loss", "gradient")]
    torch.testing.assert_close(average, list(entropy_loss(global_batch(0))), rtol=1e-5, atol=1e-6)
