"""Trains tiny models under a launcher and writes what each process ends with; see test_distributed.py."""

import argparse
import sys
import traceback
from dataclasses import replace
from pathlib import Path

import torch
from accelerate import PartialState
from safetensors.torch import save_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from pipelines.launch import exit_process, make_accelerator
from pipelines.training import NonFiniteLossError, Update, adamw, fit
from tests.test_training import CONFIG, interrupt_at, make

parser = argparse.ArgumentParser()
parser.add_argument("folder", type=Path)
parser.add_argument("models", nargs="+")
parser.add_argument("--total_steps", type=int, default=6)
parser.add_argument("--allow", action="store_true")
parser.add_argument("--fail_on", type=int)
parser.add_argument("--poison_on", type=int)
parser.add_argument("--elsewhere_on", type=int)
parser.add_argument("--stop_at", type=int)
parser.add_argument("--shard", action="store_true")
arguments = parser.parse_args()

config = replace(CONFIG, total_steps=arguments.total_steps, allow_process_count_change=arguments.allow,
                 lr_schedule="constant_with_warmup", log_every=4)  # fmt: skip
for model in arguments.models:
    folder = arguments.folder / model
    accelerator = make_accelerator(config, folder)
    if PartialState().process_index == arguments.fail_on:
        raise RuntimeError("asked to fail")
    if accelerator.process_index == arguments.elsewhere_on:
        folder = folder / "elsewhere"
    objective, train_data, validation_data = make(model, config, noise=False)
    if accelerator.process_index == arguments.poison_on:
        objective.forward = lambda batch, step=None, f=objective.forward: {
            k: v / (step != 3) for k, v in f(batch, step).items()
        }
    if arguments.shard:  # as accelerate does with FSDP 2, which it leaves out where there is no GPU
        fully_shard(objective, mesh=init_device_mesh("cpu", (accelerator.num_processes,)))
        accelerator.prepare = lambda module, optimizer, of=accelerator.prepare_optimizer: (module, of(optimizer))
    update = Update("model", objective, adamw(objective, config))
    try:
        fit(
            accelerator, [update], train_data, validation_data, folder=folder, config=config, resolved={"model": model},
            on_evaluate=interrupt_at(arguments.stop_at),
        )  # fmt: skip
    except NonFiniteLossError:
        traceback.print_exc()
        accelerator.wait_for_everyone()  # as one ends the launcher ends the others, which may not have printed yet
        sys.exit(1)
    tensors = {
        name: (value.full_tensor() if arguments.shard else value).clone(memory_format=torch.contiguous_format)
        for name, value in objective.state_dict().items()
    }
    save_file(tensors, arguments.folder / f"{model}-process{accelerator.process_index}.safetensors")
exit_process()
