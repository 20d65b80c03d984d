"""Weights and optimizers as whole tensors by name, whether the model is alone, under DDP or sharded by FSDP."""

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.optim import Optimizer

_WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)


def make_shardable(module: nn.Module) -> None:
    """FSDP takes neither other memory formats nor scalars."""
    module.to(memory_format=torch.contiguous_format)
    scalars = [name for name, parameter in module.named_parameters() if parameter.dim() == 0]
    if scalars:
        raise ValueError(
            f"FSDP cannot shard a parameter that is one number ({', '.join(scalars)}); launch without --use_fsdp, "
            "DDP holds the whole model on each device, or take a likelihood without a scale"
        )


def get_weights(module: nn.Module) -> dict[str, Tensor]:
    # On the CPU these are the module's own tensors, which go on changing
    return {name: tensor.clone() for name, tensor in get_model_state_dict(module, options=_WHOLE).items()}


def set_weights(module: nn.Module, weights: dict[str, Tensor]) -> None:
    set_model_state_dict(module, weights, options=_WHOLE)


def get_optimizer(module: nn.Module, optimizer: Optimizer) -> tuple[dict[str, Tensor], list[dict]]:
    """State as {"parameter/name": tensor}, and options; both empty on processes that do not save."""
    whole = get_optimizer_state_dict(module, optimizer, options=_WHOLE)
    if not whole:
        return {}, []
    tensors = {f"{name}/{key}": value for name, state in whole["state"].items() for key, value in state.items()}
    return tensors, whole["param_groups"]


def set_optimizer(
    module: nn.Module, optimizer: Optimizer, tensors: dict[str, Tensor], param_groups: list[dict]
) -> None:
    state: dict[str, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        parameter, key = name.rsplit("/", 1)
        state.setdefault(parameter, {})[key] = value
    groups = [{k: tuple(v) if k == "betas" else v for k, v in group.items()} for group in param_groups]
    set_optimizer_state_dict(module, optimizer, {"state": state, "param_groups": groups}, options=_WHOLE)
    # Files know no memory format, and the fused AdamW goes through memory without a look at it
    for parameter, values in optimizer.state.items():
        for key, value in values.items():
            if value.shape == parameter.shape and value.stride() != parameter.stride():
                values[key] = torch.empty_like(parameter.detach(), dtype=value.dtype).copy_(value)


def own_buffers(module: nn.Module) -> dict[str, Tensor]:
    """Buffers that a part of the model names in `per_process_buffers`, by their name in the whole."""
    return {
        f"{path}.{name}".replace("_orig_mod.", ""): part.get_buffer(name)  # compiled or not
        for path, part in module.named_modules()
        for name in getattr(part, "per_process_buffers", ())
        if name in part._buffers  # the wrapper of a compiled part has its attributes, not its buffers
    }


def set_learning_rates(scheduler) -> None:
    """Those of the scheduler's step: a state's are of its own schedule, which another total of steps changes."""
    scheduler._last_lr = [
        base_lr * factor(scheduler.last_epoch) for base_lr, factor in zip(scheduler.base_lrs, scheduler.lr_lambdas)
    ]
    for group, lr in zip(scheduler.optimizer.param_groups, scheduler._last_lr):
        group["lr"] = lr
