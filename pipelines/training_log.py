"""What a run writes down of itself while it trains."""

import json
import math
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor
from tqdm import tqdm

from pipelines.config import flatten
from pipelines.files import atomic_file, naming


class LossWindow:
    """Mean of each logged value since the last log line, without waiting for the device in between."""

    def __init__(self, accelerator: Accelerator):
        self.accelerator = accelerator
        self._restart()

    def _restart(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.counts: dict[str, int] = {}
        self.start_clock()

    def start_clock(self) -> None:
        self.num_micro_batches = 0
        self.started = time.monotonic()

    def state(self) -> dict[str, tuple[list[str], int]]:
        """{name: (each process's sum, number of values)} since the last log line.

        As text, since JSON has no infinite numbers, which gradients are where fp16 leaves out a step.
        """
        sums = {name: self.accelerator.gather(total[None]).tolist() for name, total in self.sums.items()}
        return {name: (list(map(str, totals)), self.counts[name]) for name, totals in sums.items()}

    def load_state(self, state: dict[str, tuple[list[str] | str, int]]) -> None:
        self.sums = {name: self._own(totals) for name, (totals, _) in state.items()}
        self.counts = {name: count for name, (_, count) in state.items()}

    def _own(self, totals: list[str] | str) -> Tensor:
        """This process's sum; the mean where the state is of another number of processes, or of an earlier version."""
        sums = [float(total) for total in ([totals] if isinstance(totals, str) else totals)]
        if len(sums) == self.accelerator.num_processes:
            return torch.tensor(sums[self.accelerator.process_index], device=self.accelerator.device)
        return torch.tensor(sum(sums) / len(sums), device=self.accelerator.device)

    def add(self, values: dict[str, Tensor]) -> None:
        self.num_micro_batches += 1
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, 0) + value.float()
            self.counts[name] = self.counts.get(name, 0) + 1

    def mean(self) -> dict[str, float]:
        means = {name: total / self.counts[name] for name, total in self.sums.items()}
        return {name: self.accelerator.reduce(value, "mean").item() for name, value in means.items()}

    def rate(self, images_per_micro_batch: int) -> dict[str, float]:
        rate = self.num_micro_batches * images_per_micro_batch / (time.monotonic() - self.started)
        self._restart()
        return {"images_per_second": rate}


class TrainingLog:
    """What a run says of itself: in log.jsonl, to accelerate's trackers and in the terminal, by the main process."""

    def __init__(self, accelerator: Accelerator, folder: Path):
        self.accelerator, self.folder = accelerator, folder
        self.path = folder / "log.jsonl"

    def start_trackers(self, config: dict) -> None:
        # TensorBoard takes neither lists nor None
        scalars = {k: v if isinstance(v, (int, float, bool)) else str(v) for k, v in flatten(config).items()}
        with naming(self.folder):  # a tracker's own files
            self.accelerator.init_trackers("tessera", config=scalars)

    def finish_trackers(self) -> None:
        # accelerator.end_training would also take down the processes' connection, which codes are written over
        with naming(self.folder):
            for tracker in self.accelerator.trackers:
                tracker.finish()

    def write(self, step: int, values: dict[str, float]) -> None:
        if not values:
            return
        with naming(self.folder):
            self.accelerator.log(values, step=step)
        if self.accelerator.is_main_process:
            # JSON has no infinity, which the norm of gradients is in a step that fp16 leaves out
            line = {"step": step} | {k: v if math.isfinite(v) else None for k, v in values.items()}
            with naming(self.path), self.path.open("a") as file:
                file.write(json.dumps(line) + "\n")

    def say(self, text: str) -> None:
        if self.accelerator.is_main_process:
            tqdm.write(text, file=sys.stdout)
            sys.stdout.flush()

    def last_evaluation(self) -> int:
        """The last step of which the log has validation metrics; 0 without one."""
        entries = [entry for _, entry in log_entries(self.path)]
        evaluated = (entry for entry in entries if any(key.startswith("validation/") for key in entry))
        return max((entry["step"] for entry in evaluated), default=0)

    def drop_after(self, step: int) -> None:
        """Removes lines that a continued run will write again."""
        if self.path.exists():
            with atomic_file(self.path) as file:
                file.writelines(line for line, entry in log_entries(self.path) if entry["step"] <= step)


def log_entries(path: Path) -> Iterator[tuple[bytes, dict]]:
    """The lines of a log, as they stand and what they say; raises ValueError for one that is damaged."""
    for line in path.read_bytes().splitlines(keepends=True) if path.exists() else []:
        if not line.endswith(b"\n"):  # a line that a killed run or a full disk cut off has no end
            continue
        try:
            yield line, json.loads(line)
        except ValueError as error:
            raise ValueError(f"{path} has a damaged line ({line[:40]!r}); remove the line or the file") from error


def brief(values: dict[str, float]) -> str:
    """What a line of the terminal has room for."""
    skipped = ("learning_rate", "images_per_second", "grad_norm")
    return ", ".join(f"{k} {v:.4g}" for k, v in values.items() if k not in skipped)
