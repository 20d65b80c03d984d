"""Times this library and its peers side by side, in one process and in turn, and measures their memory.

    python scripts/benchmark.py quantizer
    python scripts/benchmark.py sampling --peer rosinality=../vq-vae-2-pytorch --threads 2

Peers on PyPI take part where they are installed (pip install 'tessera-codes[bench]'), others as work trees. Writes a
table, JSON and a chart to benchmark_results/, to 2_threads/ there with --threads 2, to quick/ with --sizes quick. What
lies in one of them is put on one page by

    python scripts/benchmark.py summary
"""

import argparse
import importlib
import os
from pathlib import Path

BENCHMARKS = {
    "quantizer": "train step of a vector quantizer",
    "tokenizer": "train step of a VQ-VAE-2",
    "sampling": "drawing codes from GPT, PixelCNN and PixelSNAIL",
    "codes": "writing a data set's codes and reading them back",
    "boltzmann": "block Gibbs sampling of a Boltzmann machine",
    "training": "what the training loop adds to a step, and the time to import and load",
}
ON_GPU = ("quantizer", "tokenizer", "sampling", "training")
RESULTS = Path(__file__).parent / "benchmark_results"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = "; ".join(f"{name}: {measured}" for name, measured in BENCHMARKS.items())
    parser.add_argument("benchmark", choices=[*BENCHMARKS, "summary"], help=what)
    peers = "work tree of rosinality, llamagen, taming or ritheshkumar95; may be repeated"
    parser.add_argument("--peer", action="append", default=[], metavar="NAME=FOLDER", help=peers)
    parser.add_argument("--threads", type=int, default=1, help="1 measures CPU time, more wall time")
    device = (
        "where candidates run: cpu, or cuda, by wall time and in bfloat16 where that is usual; not for all, and in "
        "tokenizer and training with other models, also compiled"
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help=device)
    parser.add_argument("--rounds", type=int, default=5, help="paired measurements of each case")
    parser.add_argument("--sizes", choices=("quick", "full"), default="full", help="quick: tiny, to see that it works")
    parser.add_argument("--only", default="", metavar="TEXT", help="only cases with this in their title")
    memory = "memory that a candidate may take where its peak is measured; 0 leaves that out"
    parser.add_argument("--memory_limit_gb", type=float, default=8.0, help=memory)
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="in place of these folders")
    arguments = parser.parse_args()
    arguments.output = arguments.output or default_output(arguments)
    # Before torch is imported: libraries size their pools then
    os.environ["OMP_NUM_THREADS"] = str(max(1, arguments.threads))

    from pipelines.scripting import run_script

    run_script(lambda: print_summary(arguments.output) if arguments.benchmark == "summary" else run(arguments))


def default_output(arguments: argparse.Namespace) -> Path:
    """A folder for each way to measure, so that no try-out takes the place of what is published."""
    several = [f"{arguments.threads}_threads"] * (arguments.threads > 1)
    return RESULTS.joinpath(*["quick"] * (arguments.sizes == "quick"), *several)


def print_summary(folder: Path) -> None:
    from benchmarks.summary import summary

    print(summary(folder, BENCHMARKS))


def run(arguments: argparse.Namespace) -> None:
    import torch
    from benchmarks.measure import Clock
    from benchmarks.peers import Peers
    from benchmarks.report import Report

    for name in ("threads", "rounds"):
        if getattr(arguments, name) < 1:
            raise ValueError(f"--{name} must be at least 1, got {getattr(arguments, name)}")
    if not arguments.memory_limit_gb >= 0:
        raise ValueError(f"--memory_limit_gb must be at least 0, got {arguments.memory_limit_gb}")
    if arguments.device != "cpu":
        check_gpu(arguments.benchmark)
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    peers, clock = Peers(arguments.peer), Clock(arguments.threads, arguments.device)
    limit, folder = arguments.memory_limit_gb, arguments.output
    report = Report(arguments.benchmark, peers, clock, arguments.rounds, limit, arguments.only, folder)
    module = importlib.import_module(f"benchmarks.{arguments.benchmark}")
    module.run(report, peers, clock, arguments.rounds, arguments.sizes, limit)
    if not report.cases:
        titles = ", ".join(f"'{title}'" for title in report.titles)
        raise ValueError(
            f"no case of {arguments.benchmark} has '{arguments.only}' in its title; its cases are {titles}"
        )
    report.write(folder)


def check_gpu(benchmark: str) -> None:
    import torch

    if benchmark not in ON_GPU:
        raise ValueError(f"{benchmark} is for CPUs; --device cuda is known to {', '.join(ON_GPU)}")
    if not torch.cuda.is_available():
        raise ValueError("--device cuda: torch finds no GPU here; leave it out to run on the CPU")


if __name__ == "__main__":
    main()
