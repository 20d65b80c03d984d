"""What a benchmark leaves: a table on the screen, and JSON, Markdown and a chart in a folder."""

import platform
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from benchmarks.floors import machine_floors
from benchmarks.measure import Clock, Timing
from benchmarks.peers import Peers
from pipelines.evaluation.protocol import versions
from pipelines.files import atomic_file, write_json_atomic
from pipelines.images import num_usable_cores

PACKAGES = ("torch", "numpy", "transformers", "diffusers", "vector-quantize-pytorch", "lmdb")


@dataclass
class Case:
    """One configuration.

    parameters: its sizes; seconds: median of each candidate; ratios: for each reference, each candidate's time in units
    of it (first quartile, median, third quartile); peak_bytes: beyond what was there before, None where the limit did
    not suffice; checks: other numbers, by what they count.
    """

    parameters: dict[str, int | str]
    seconds: dict[str, float] = field(default_factory=dict)
    ratios: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    peak_bytes: dict[str, int | None] = field(default_factory=dict)
    checks: dict[str, float] = field(default_factory=dict)

    def add(self, timings: dict[str, Timing], references: tuple[str, ...]) -> None:
        self.seconds = {name: timing.median for name, timing in timings.items()}
        self.ratios = {
            reference: {name: timing.ratios(timings[reference]) for name, timing in timings.items()}
            for reference in references
            if reference in timings
        }

    @property
    def title(self) -> str:
        return ", ".join(f"{name} {value}" for name, value in self.parameters.items())

    def table(self) -> list[list[str]]:
        """Header and rows: a candidate's time, its ratios and its memory."""
        header = ["", "ms", *(f"x {reference}" for reference in self.ratios)]
        names = list(dict.fromkeys([*self.seconds, *self.peak_bytes]))
        rows = []
        for name in names:
            seconds = self.seconds.get(name)
            row = [name, "-" if seconds is None else f"{seconds * 1e3:.3g}"]
            row += [_spread(ratios.get(name)) for ratios in self.ratios.values()]
            if self.peak_bytes:
                row.append(_megabytes(self.peak_bytes, name))
            rows.append(row)
        return [header + ["peak MB"] * bool(self.peak_bytes), *rows]


class Report:
    """The cases of one benchmark, printed as they come.

    Args:
        benchmark: its name.
        peers: with what; a work tree's commit stands among the versions.
        clock: what time was measured.
        rounds: paired measurements per case.
        memory_gb: limit of the processes in which memory was measured.
        only: text that the titles of the cases must contain; it becomes a part of the files' name.
        folder: where the cases so far are kept in NAME.unfinished.json, for a run that is stopped; None keeps none.
    """

    def __init__(
        self,
        benchmark: str,
        peers: Peers,
        clock: Clock,
        rounds: int,
        memory_gb: float,
        only: str = "",
        folder: Path | None = None,
    ):
        self.name = "-".join([benchmark, *only.split(), *[clock.device] * (clock.device != "cpu")])
        self.benchmark, self.only, self.folder = benchmark, only, folder
        self.cases: list[Case] = []
        self.titles: list[str] = []
        self.head = {
            "benchmark": benchmark,
            "date": time.strftime("%Y-%m-%d"),
            "machine": machine(clock),
            "versions": versions(PACKAGES) | peers.versions(),
            "clock": clock.name,
            "rounds": rounds,
            "memory_limit_gb": memory_gb,
            "floors": machine_floors(clock),
        }
        print(f"{benchmark}: {place(self.head)}, medians of {rounds} paired rounds with quartiles; "
              + ", ".join(f"{name} {value:.3g}" for name, value in self.head["floors"].items()))  # fmt: skip

    def wants(self, case: Case) -> bool:
        """Whether `only` is in its title; to be asked about every case."""
        self.titles.append(case.title)
        return self.only in case.title

    def add(self, case: Case) -> None:
        self.cases.append(case)
        print(f"\n{case.title}")
        for line in _aligned(case.table()) if case.seconds else []:
            print("  " + line)
        for what, value in case.checks.items():
            print(f"  {what}: {value:.4g}")
        if self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_json_atomic(self.folder / f"{self.name}.unfinished.json", self.results())

    def results(self) -> dict:
        return {**self.head, "cases": [asdict(case) for case in self.cases]}

    def write(self, folder: Path) -> None:
        """NAME.json, NAME.md and, where matplotlib is installed, NAME.png."""
        folder.mkdir(parents=True, exist_ok=True)
        write_json_atomic(folder / f"{self.name}.json", self.results())
        with atomic_file(folder / f"{self.name}.md") as file:
            file.write(self.markdown().encode())
        try:
            from benchmarks.chart import draw
        except ModuleNotFoundError:
            print("no chart: pip install 'tessera-codes[bench]'")
        else:
            draw(self, folder / f"{self.name}.png")
        (folder / f"{self.name}.unfinished.json").unlink(missing_ok=True)

    def markdown(self) -> str:
        head = self.head
        lines = [
            f"# {self.benchmark}",
            "",
            f"{head['date']}, {place(head)}, "
            + ", ".join(f"{name} {number}" for name, number in head["versions"].items())
            + f". Medians of {head['rounds']} rounds; ratios are paired within a round, with quartiles.",
            "",
            "Machine: " + ", ".join(f"{name} {value:.3g}" for name, value in head["floors"].items()) + ".",
        ]
        for case in self.cases:
            header, *rows = case.table()
            lines += ["", f"## {case.title}", ""]
            if rows:
                lines += [markdown_row(row) for row in (header, ["---"] * len(header), *rows)] + [""]
            lines += [f"- {what}: {value:.4g}" for what, value in case.checks.items()]
        return "\n".join(lines) + "\n"


def machine(clock: Clock) -> dict:
    """The CPU's name, how many of its cores this process may use and did use, and the GPU's name if it is timed."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    name = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    found = {"cpu": name, "cores": num_usable_cores(), "threads": clock.threads, "system": platform.system()}
    return found | ({"gpu": torch.cuda.get_device_name()} if clock.on_gpu else {})


def place(head: dict) -> str:
    """On what a benchmark ran, and what was timed."""
    machine = head["machine"]
    if "gpu" in machine:
        return f"{machine['gpu']}, {head['clock']}"
    threads = machine["threads"]
    return f"{machine['cpu']}, {head['clock']} of {threads} thread{'s' if threads > 1 else ''}"


def _spread(ratios: list[float] | None) -> str:
    if ratios is None:
        return "-"
    low, middle, high = ratios
    return f"{middle:.3g} ({low:.3g}-{high:.3g})"


def _megabytes(peaks: dict[str, int | None], name: str) -> str:
    if name not in peaks:
        return "-"
    return "over the limit" if peaks[name] is None else f"{peaks[name] / 1e6:.3g}"


def _aligned(table: list[list[str]]) -> list[str]:
    widths = [max(len(row[column]) for row in table) for column in range(len(table[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in table]


def markdown_row(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"
