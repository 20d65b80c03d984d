"""What this machine can do at most, measured in the same run: no candidate can be judged without it."""

import statistics

import torch

from benchmarks.measure import Clock


def machine_floors(clock: Clock) -> dict[str, float]:
    """Rates of matrix products, of copies in memory and of random numbers, by name with unit; medians of five."""
    a, b = torch.randn(1024, 1024), torch.randn(1024, 1024)
    source, target = torch.zeros(2**24), torch.empty(2**24)  # 64 MB each: beyond any cache
    uniform = torch.empty(2**20)
    product = torch.empty(1024, 1024)
    return {
        "GEMM GFLOP/s": 2 * 1024**3 / 1e9 / _seconds(lambda: torch.mm(a, b, out=product), clock),
        "copy GB/s": 2 * source.nbytes / 1e9 / _seconds(lambda: target.copy_(source), clock),
        "random Gbit/s": 32 * uniform.numel() / 1e9 / _seconds(lambda: uniform.uniform_(), clock),
    }


def _seconds(function, clock: Clock) -> float:
    function()
    times = []
    for _ in range(5):
        start = clock()
        function()
        times.append(clock() - start)
    return statistics.median(times)
