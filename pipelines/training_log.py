"""What a run writes down of itself while it trains."""

import json
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor

from pipelines.files import atomic_file


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


def last_evaluation(path: Path) -> int:
    """The last step of which a log has validation metrics; 0 without one."""
    entries = [entry for _, entry in _entries(path)]
    return max((entry["step"] for entry in entries if any(key.startswith("validation/") for key in entry)), default=0)


def drop_log_after(path: Path, step: int) -> None:
    """Removes lines that a continued run will write again."""
    if path.exists():
        with atomic_file(path) as file:
            file.writelines(line for line, entry in _entries(path) if entry["step"] <= step)


def _entries(path: Path) -> Iterator[tuple[bytes, dict]]:
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
