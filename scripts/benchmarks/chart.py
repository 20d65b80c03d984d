"""A chart of a benchmark: for each case, every candidate's time in units of this library's."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # no screen

import matplotlib.pyplot as plt

from benchmarks.report import place

COLUMNS = 3


def draw(report, path: Path) -> None:
    cases = [case for case in report.cases if case.ratios]
    if not cases:
        return
    columns = min(COLUMNS, len(cases))
    rows = -(-len(cases) // columns)
    tallest = max(len(_bars(case)) for case in cases)
    size = (4.6 * columns, 0.5 + (0.7 + 0.22 * tallest) * rows)
    figure, axes = plt.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")
    for axis in axes.flat[len(cases) :]:
        axis.axis("off")
    for axis, case in zip(axes.flat, cases):
        bars = _bars(case)
        names, middles = list(bars), [middle for _, middle, _ in bars.values()]
        errors = [
            [middle - low for low, middle, _ in bars.values()],
            [high - middle for _, middle, high in bars.values()],
        ]
        colors = [
            "tab:orange" if n.startswith("tessera") else "0.8" if n.startswith("floor") else "tab:blue" for n in bars
        ]
        axis.barh(names, middles, xerr=errors, color=colors, height=0.7)
        axis.bar_label(axis.containers[-1], fmt=" %.2f", fontsize=6)
        axis.invert_yaxis()
        axis.set_title(case.title, fontsize=8)
        axis.tick_params(labelsize=6)
        axis.margins(x=0.18)
        axis.spines[["top", "right"]].set_visible(False)
    head = report.head
    figure.suptitle(
        f"{report.benchmark}: times in units of {_reference(cases[0])} ({place(head)}, {head['date']})",
        fontsize=9,
        wrap=True,
    )
    figure.savefig(path, dpi=80)
    plt.close(figure)


def _reference(case) -> str:
    return next(name for name in case.ratios if name.startswith("tessera"))


def _bars(case) -> dict[str, list[float]]:
    return case.ratios[_reference(case)]
