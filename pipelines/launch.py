"""How a process takes its place and how it ends: the accelerator, the launcher it belongs to, signals to stop."""

import os
import signal
import sys
from datetime import timedelta
from pathlib import Path
from typing import NoReturn

import torch
import torch.distributed as dist
from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs
from accelerate.tracking import get_available_trackers
from accelerate.utils import GradientAccumulationPlugin, LoggerType

from tokenizer.registry import nearest_known

LAUNCHED_BY = "TESSERA_LAUNCHED_BY"  # variable of the environment: the process id of the script that runs this one

# All processes wait for the one that downloads, and that looks at each file of a million first. Where one fails, the
# launcher ends the others at once.
LONGEST_WAIT = timedelta(hours=2)


def make_accelerator(config, folder: Path) -> Accelerator:
    """The accelerator for a run.

    Args:
        config: a `TrainingConfig`.
        folder: where trackers write.
    Raises:
        ValueError: several processes were launched that do not know of each other, a tracker that is not installed, or
            bf16 on a CPU that computes it slower than float32.
    """
    check_tracker(config.tracker)
    end_with_the_launcher()
    cpu = config.cpu or not torch.accelerator.is_available()
    accelerator = Accelerator(
        cpu=cpu,
        mixed_precision=config.mixed_precision,
        # The plain argument gives way to a variable of the environment, and the loop would count otherwise
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=config.gradient_accumulation_steps),
        log_with=None if config.tracker == "none" else config.tracker,
        project_dir=folder,
        kwargs_handlers=[
            # Codebooks are made equal by their own all-reduce; a broadcast would throw away what others counted.
            DistributedDataParallelKwargs(broadcast_buffers=False),
            InitProcessGroupKwargs(timeout=LONGEST_WAIT),
        ],
    )
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if launched != accelerator.num_processes:
        raise ValueError(
            f"{launched} processes were launched, but accelerate sees {accelerator.num_processes}: each would train "
            "alone and write the same files. On CPUs, set ACCELERATE_USE_CPU=true, and accelerate launch --multi_gpu"
        )
    if accelerator.mixed_precision == "bf16" and accelerator.device.type == "cpu" and not cpu_computes_bf16():
        raise ValueError(
            "mixed_precision = 'bf16' on this CPU, which has no bf16 units, is over twice as slow as float32; take 'no'"
        )
    return accelerator


def check_tracker(name: str) -> None:
    """Raises ValueError for a tracker that is unknown or not installed; accelerate would go on without one."""
    known = [str(tracker) for tracker in LoggerType]
    if name not in ("none", *known):
        raise ValueError(f"unknown training.tracker '{name}'{nearest_known(name, ['none', *known])}")
    if name not in ("none", "all", *map(str, get_available_trackers())):
        raise ValueError(f"training.tracker = '{name}' is not installed: pip install {name}, or take 'tensorboard'")


def cpu_computes_bf16() -> bool:
    found = getattr(torch.cpu, "get_capabilities", dict)()  # nothing where torch is too old to tell
    return not found or any(found.get(unit) for unit in ("avx512_bf16", "amx_bf16", "bf16"))  # the last is ARM's


def end_with_the_launcher() -> None:
    """Lets this process be told when its launcher dies, which would otherwise leave it training unseen (Linux).

    Without a launcher the parent is a shell, whose end must not stop a run started with nohup.
    """
    names = ("ACCELERATE_MIXED_PRECISION", "TORCHELASTIC_RUN_ID", LAUNCHED_BY)
    if any(name in os.environ for name in names) and sys.platform == "linux":
        import ctypes

        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGTERM)
        # It may have died before, while this process imported; in a container process 1 can be the launcher itself
        parent = Path("/proc/1/cmdline").read_bytes()
        is_launcher = b"accelerate" in parent or b"torch" in parent or os.environ.get(LAUNCHED_BY) == "1"
        if os.getppid() == 1 and not is_launcher:
            os.kill(os.getpid(), signal.SIGTERM)


def ignore_stop_signals(worker_id: int) -> None:
    """For processes that load data: a signal to the whole group must not take them from a run that will save first."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


class StopRequest:
    """Notes SIGTERM and SIGINT, so that a run ends between two steps with its state saved."""

    def __init__(self):
        self.signal_number: int | None = None

    def __enter__(self):
        self._old = {number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *exception):
        for number, handler in self._old.items():
            signal.signal(number, handler)

    def _note(self, number, frame):
        self.signal_number = number

    def agreed(self, accelerator: Accelerator) -> bool:
        """Whether any process was asked to stop; the same answer on all."""
        if accelerator.num_processes == 1:
            return self.signal_number is not None
        flag = torch.tensor(float(self.signal_number or 0), device=accelerator.device)
        dist.all_reduce(flag, dist.ReduceOp.MAX)
        self.signal_number = int(flag.item()) or None
        return self.signal_number is not None


def exit_process(status: int | str = 0) -> NoReturn:
    """Ends a script like `sys.exit`, and safely so where it is one of several processes.

    The threads of gloo let go of a collective some time after it is done, and with it of Python objects that they
    carried along (torch 2.13). Where the interpreter is closing down by then, that aborts the process, and a run that
    did all it should fails with SIGABRT. So the interpreter does not close down here: there is nothing left for it to
    do.
    """
    if not dist.is_initialized():
        sys.exit(status)
    if isinstance(status, str):
        print(status, file=sys.stderr)
    if status == 0:
        dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status if isinstance(status, int) else 1)
