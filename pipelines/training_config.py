"""How a model is trained, as users give it."""

from dataclasses import dataclass
from typing import Literal

# Fields that may change between a run and its continuation without making it another run.
FREE_TO_CHANGE = (
    "training.total_steps", "training.num_workers", "training.log_every", "training.eval_every", "training.save_every",
    "training.tracker", "training.cpu", "training.allow_process_count_change", "training.compile",
    "training.compile_mode",
    "data.root", "data.download", "data.cache_bytes", "output",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """How a model is trained.

    Args:
        total_steps: optimizer steps in all.
        batch_size: images per optimizer step, over all processes and accumulated micro-batches: the same number
            means the same training on one device and on eight.
        gradient_accumulation_steps: micro-batches that one step is made of. Batch norm (in networks mlp), LFQ's
            entropy, free_nats and the balance of local latents in the warm-up of the KL term see one at a time, and a
            Boltzmann prior's chains move on at each; all else trains as with one batch.
        learning_rate: peak learning rate of AdamW.
        weight_decay: decoupled weight decay.
        adam_beta1: decay of the first moment.
        adam_beta2: decay of the second moment.
        adam_eps: added to the root of the second moment.
        lr_schedule: shape of the learning rate after the warm-up.
        warmup_steps: steps over which the learning rate rises linearly from 0.
        max_grad_norm: gradients are clipped to this norm; 0 turns it off.
        ema_decay: decay of the running average of the weights, which is what is evaluated and saved; 0 turns it off.
        mixed_precision: "no", "fp16" or "bf16"; null (None in Python) takes what accelerate was launched with.
        compile: compile the model with torch.compile, which needs a C++ compiler.
        compile_mode: torch.compile's own; reduce-overhead replays small models from CUDA graphs, as max-autotune does,
            and both need gradient_accumulation_steps = 1.
        seed: seed of weights, data order and noise.
        num_workers: processes that load data beside each training process.
        log_every: steps between lines of the log.
        eval_every: steps between evaluations on the validation data, with pictures.
        save_every: steps between saved states.
        tracker: "tensorboard", any other tracker that accelerate knows, or "none"; log.jsonl is always written.
        cpu: train on the CPU even where there is an accelerator.
        allow_process_count_change: let a run continue on another number of processes; its noise then differs.
    """

    total_steps: int = 2000
    batch_size: int = 64
    gradient_accumulation_steps: int = 1
    learning_rate: float = 1e-3
    weight_decay: float = 0.0
    adam_beta1: float = 0.9
    adam_beta2: float = 0.95
    adam_eps: float = 1e-8
    lr_schedule: Literal["cosine", "linear", "constant_with_warmup"] = "cosine"
    warmup_steps: int = 100
    max_grad_norm: float = 1.0
    ema_decay: float = 0.999
    mixed_precision: Literal["no", "fp16", "bf16"] | None = None
    compile: bool = False
    compile_mode: Literal["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"] = "default"
    seed: int = 0
    num_workers: int = 0
    log_every: int = 50
    eval_every: int = 500
    save_every: int = 500
    tracker: str = "tensorboard"
    cpu: bool = False
    allow_process_count_change: bool = False

    def __post_init__(self):
        for name in (
            "total_steps",
            "batch_size",
            "gradient_accumulation_steps",
            "log_every",
            "eval_every",
            "save_every",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"training.{name} must be at least 1, got {getattr(self, name)}")
        for name in ("warmup_steps", "weight_decay", "max_grad_norm", "num_workers"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"training.{name} must be at least 0, got {getattr(self, name)}")
        for name in ("adam_beta1", "adam_beta2", "ema_decay"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"training.{name} must lie in [0, 1), got {getattr(self, name)}")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"training.seed must lie in [0, 2^63), got {self.seed}")
        for name in ("adam_eps", "learning_rate"):
            if not getattr(self, name) > 0:
                raise ValueError(f"training.{name} must be above 0, got {getattr(self, name)}")
        by_graphs = self.compile and self.compile_mode in ("reduce-overhead", "max-autotune")
        if by_graphs and self.gradient_accumulation_steps > 1:
            raise ValueError(
                f"training.compile_mode {self.compile_mode} replays CUDA graphs, and the graph of a micro-batch "
                "overwrites what the one before it left for the optimizer step, but "
                f"training.gradient_accumulation_steps is {self.gradient_accumulation_steps}; "
                "take compile_mode default or max-autotune-no-cudagraphs, or 1 micro-batch"
            )
