"""How candidates are timed: in turn, within one process, compared round by round.

Absolute times drift with the machine's load and clock by a factor of two; the ratio of two candidates that ran one
right after the other hardly does. So a result is the median of ratios within a round, with quartiles.
"""

import gc
import multiprocessing
import resource
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

GIGABYTE = 2**30


@dataclass(frozen=True)
class Clock:
    """CPU time of this process for one thread, which other processes do not disturb; wall time for several, and on a
    GPU, after all that it has been given to do."""

    threads: int
    device: str = "cpu"

    @property
    def on_gpu(self) -> bool:
        return self.device != "cpu"

    @property
    def name(self) -> str:
        return "wall time" if self.on_gpu or self.threads > 1 else "CPU time"

    def __call__(self) -> float:
        """Seconds."""
        if self.on_gpu:
            torch.cuda.synchronize()
        return time.process_time() if self.name == "CPU time" else time.perf_counter()


@dataclass
class Timing:
    """Seconds of one call of a candidate, in each round; counts may differ between candidates, not between rounds."""

    seconds: list[float]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    def ratios(self, other: "Timing") -> list[float]:
        """First quartile, median and third quartile of this candidate's time in units of the other's."""
        ratios = sorted(mine / theirs for mine, theirs in zip(self.seconds, other.seconds, strict=True))
        if len(ratios) == 1:
            return ratios * 3
        return statistics.quantiles(ratios, n=4, method="inclusive")


def compare(
    candidates: dict[str, Callable[[], object]], clock: Clock, rounds: int, shortest: float = 0.02
) -> dict[str, Timing]:
    """Times each candidate once in every round, the order turned by one from round to round.

    Args:
        candidates: functions without arguments; each is called before anything is timed.
        rounds: paired measurements.
        shortest: seconds that one measurement should last; quick candidates are called several times.
    """
    calls = {}
    for name, function in candidates.items():
        seconds = _seconds(function, clock)
        if seconds < 1:  # what a library does at its first call matters to quick ones only
            seconds = _seconds(function, clock)
        calls[name] = max(1, round(shortest / max(seconds, 1e-7)))
    timings = {name: Timing([]) for name in candidates}
    order = list(candidates)
    gc.collect()
    gc.freeze()  # what there is by now, millions of objects of large libraries, is not gone through before every call
    for _ in range(rounds):
        for name in order:
            gc.collect()
            start = clock()
            for _ in range(calls[name]):
                candidates[name]()
            timings[name].seconds.append((clock() - start) / calls[name])
        order = [*order[1:], order[0]]
    gc.unfreeze()
    return timings


def _seconds(function: Callable[[], object], clock: Clock) -> float:
    start = clock()
    function()
    return clock() - start


def peak_memory(make: Callable, args: tuple, small_args: tuple, limit_gb: float, device: str = "cpu") -> int | None:
    """Bytes of resident memory that `make(*args)()` needs at most beyond what is there before, in a process of its own;
    with another device than the CPU, of that device's memory.

    None where it would not fit into `limit_gb` beyond the libraries. `make(*small_args)()` is called first, for what
    libraries take at their first use.
    """
    if device != "cpu":
        return _peak_of_gpu(make, args, small_args, limit_gb)
    context = multiprocessing.get_context("spawn")  # a fork would inherit this process's own peak
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_measure_peak, args=(sender, make, args, small_args, limit_gb))
    process.start()
    sender.close()
    try:
        result = receiver.recv()
    except EOFError:  # killed for memory
        result = None
    process.join()
    if isinstance(result, str):
        raise RuntimeError(f"{make.__qualname__}{args}: {result}")
    return result


def _peak_of_gpu(make: Callable, args: tuple, small_args: tuple, limit_gb: float) -> int | None:
    """`peak_memory` as torch's own allocator counts it, for which no process of its own is needed."""
    with torch.device("cuda"):
        make(*small_args)()
        function = make(*args)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    try:
        function()
    except torch.OutOfMemoryError:
        return None
    peak = torch.cuda.max_memory_allocated() - before
    return peak if peak <= limit_gb * GIGABYTE else None


def _measure_peak(sender, make: Callable, args: tuple, small_args: tuple, limit_gb: float) -> None:
    torch.set_num_threads(1)
    try:
        make(*small_args)()
        function = make(*args)
        gc.collect()
        address_space = _status("VmSize") + int(limit_gb * GIGABYTE)
        resource.setrlimit(resource.RLIMIT_AS, (address_space, address_space))
        before = _reset_peak()
        function()
        sender.send(max(0, _peak() - before))
    except (RuntimeError, MemoryError) as error:
        out_of_memory = isinstance(error, MemoryError) or "can't allocate memory" in str(error)
        sender.send(None if out_of_memory else str(error))


def _reset_peak() -> int:
    """Bytes resident now; on Linux the peak counts anew from here, where what the imports once took is forgotten."""
    if Path("/proc/self/clear_refs").exists():
        Path("/proc/self/clear_refs").write_text("5")
        return _status("VmRSS")
    return _peak()


def _peak() -> int:
    if Path("/proc/self/status").exists():
        return _status("VmHWM")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _status(field: str) -> int:
    path = Path("/proc/self/status")
    lines = path.read_text().splitlines() if path.exists() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":")), 0)
