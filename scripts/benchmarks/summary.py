"""The results in a folder as one short page of Markdown: this library beside the fastest other and the floor."""

from itertools import groupby
from pathlib import Path

from benchmarks.report import markdown_row, place
from pipelines.files import read_json

HEADER = ["case", "ms", "fastest other", "its time / ours", "our time / floor", "peak MB", "its peak MB"]


def summary(folder: Path, benchmarks: dict[str, str]) -> str:
    """Tables in the order of `benchmarks`, which are described there, also of runs with `--only` and on a GPU; cases
    that differ in their last number alone share a row.

    Raises:
        ValueError: there are no results.
    """
    files = sorted(path for path in folder.glob("*.json") if not path.name.endswith(".unfinished.json"))
    results = [read_json(path) for path in files]
    pages = [page(one, what) for name, what in benchmarks.items() for one in results if one["benchmark"] == name]
    if not pages:
        raise ValueError(f"{folder} has no results; run scripts/benchmark.py {next(iter(benchmarks))} first")
    return "\n".join(pages)


def page(results: dict, what: str) -> str:
    lines = [f"**{what[0].upper()}{what[1:]}** ({results['date']}, {place(results)})", ""]
    timed = [case for case in results["cases"] if case["seconds"]]
    rows = [row(list(cases)) for _, cases in groupby(timed, key=all_but_the_last_value)]
    kept = [i for i in range(len(HEADER)) if any(cells[i] for cells in rows)]
    if rows:
        table = [HEADER, ["---"] * len(HEADER), *rows]
        lines += [markdown_row([cells[i] for i in kept]) for cells in table] + [""]
    for case in results["cases"]:
        if not case["seconds"]:
            lines += [f"- {name}: {value:.3g}" for name, value in case["checks"].items()] + [""]
    return "\n".join(lines)


def all_but_the_last_value(case: dict) -> tuple:
    *first, (last, _) = case["parameters"].items()
    return first, last


def row(cases: list[dict]) -> list[str]:
    """Cells of cases that differ in the value of their last parameter alone."""
    first, last = all_but_the_last_value(cases[0])
    values = joined(str(case["parameters"][last]) for case in cases)
    title = ", ".join(value if name == "what" else f"{name} {value}" for name, value in [*first, (last, values)])
    found = [compared(case) for case in cases]
    others = ", ".join(dict.fromkeys(one["fastest other"] for one in found if one["fastest other"]))
    ms, *rest = (joined(one[name] for one in found) for name in ("ms", *HEADER[3:]))
    return [title, ms, others, *rest]


def compared(case: dict) -> dict[str, str]:
    """Cells of one case by column, as far as there is something to compare with."""
    names = list(case["seconds"])
    ours, floors = names[0], [name for name in names if name.startswith("floor")]
    others = [name for name in names[1:] if not name.startswith(("floor", "part"))]
    cells = dict.fromkeys(HEADER, "") | {"ms": three_digits(case["seconds"][ours] * 1e3)}
    if ours in case["peak_bytes"]:
        cells["peak MB"] = megabytes(case["peak_bytes"][ours])
    if floors:
        cells["our time / floor"] = f"{case['ratios'][floors[0]][ours][1]:.2f}"
    if others:
        other = min(others, key=case["seconds"].get)
        cells |= {"fastest other": other, "its time / ours": f"{case['ratios'][ours][other][1]:.2f}"}
        if other in case["peak_bytes"]:
            cells["its peak MB"] = megabytes(case["peak_bytes"][other])
    return cells


def megabytes(peak: int | None) -> str:
    return "over the limit" if peak is None else three_digits(peak / 1e6)


def three_digits(value: float) -> str:
    """Three significant digits, without an exponent."""
    return f"{float(f'{value:.3g}'):,.12g}"


def joined(cells) -> str:
    cells = list(cells)
    return " / ".join(cells) if any(cells) else ""
