"""What this machine can do at most, measured in the same run: no candidate can be judged without it."""

import statistics

import torch

from benchmarks.measure import Clock


def machine_floors(clock: Clock) -> dict[str, float]:
    """Rates of matrix products, of copies in memory and of random numbers, by name with unit; medians of five."""
    # beyond any cache, and long enough for a GPU's start of work not to count
    side, length = (8192, 2**28) if clock.on_gpu else (1024, 2**24)
    with torch.device(clock.device):
        a, b, product = torch.randn(side, side), torch.randn(side, side), torch.empty(side, side)
        source, target, uniform = torch.zeros(length), torch.empty(length), torch.empty(length // 16)
    gflop = 2 * side**3 / 1e9
    rates = {
        "GEMM GFLOP/s": gflop / _seconds(lambda: torch.mm(a, b, out=product), clock),
        "copy GB/s": 2 * source.nbytes / 1e9 / _seconds(lambda: target.copy_(source), clock),
        "random Gbit/s": 32 * uniform.numel() / 1e9 / _seconds(lambda: uniform.uniform_(), clock),
    }
    if clock.on_gpu:
        a, b, product = (matrix.bfloat16() for matrix in (a, b, product))
        rates["bf16 GEMM GFLOP/s"] = gflop / _seconds(lambda: torch.mm(a, b, out=product), clock)
    return rates


def _seconds(function, clock: Clock) -> float:
    function()
    times = []
    for _ in range(5):
        start = clock()
        function()
        times.append(clock() - start)
    return statistics.median(times)
