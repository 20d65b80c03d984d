"""Charts as SVG, written from the data: curves and a scatter, with labelled axes and a legend.

Colours are names of CSS variables, so that a page shows them in light and dark. As files of their own, charts bring
those variables along. A series keeps its colour and its mark in all charts.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 480, 330
LEFT, RIGHT, TOP, BOTTOM = 62, 12, 12, 48
LINE_HEIGHT = 19
LABEL_SIZE = 11
LETTER_WIDTH = 0.6 * LABEL_SIZE  # about that of wide fonts
AWAY = (0, 15, 40)  # from a point to its label
LEGEND_COLUMNS = 2
MARK = 5
NEAR_ZERO = 0.4  # of the largest value: an axis whose smallest value lies below that begins at 0
# (light, dark): told apart by people of any colour vision as well as eight colours can be; the mark tells the rest
PALETTE = (
    ("#1f6fb4", "#6cb2f0"), ("#d1570b", "#ff9d4d"), ("#218a3d", "#5fd07e"), ("#c22a35", "#ff7d84"),
    ("#7a52b3", "#bb9cf0"), ("#8a5a44", "#d3a58f"), ("#c0398b", "#f58ccb"), ("#12858f", "#54cfd9"),
)  # fmt: skip
DASHES = ("none", "6 4", "2 3")
INK = {"ink": ("#1c2128", "#e6e9ee"), "faint": ("#5b6470", "#9aa4b1"), "line": ("#d5dae1", "#39414c"),
       "paper": ("#ffffff", "#14181d")}  # fmt: skip


@dataclass(frozen=True)
class Series:
    """Points of one model. number: which decides colour and mark; title: in the legend."""

    number: int
    title: str
    points: Sequence[tuple[float, float]]


def css_variables() -> str:
    """The colours, for light and dark."""
    colours = {f"s{number}": pair for number, pair in enumerate(PALETTE)} | INK
    light, dark = ("".join(f"--{name}:{pair[which]};" for name, pair in colours.items()) for which in (0, 1))
    return f":root{{{light}}}\n@media (prefers-color-scheme: dark){{:root{{{dark}}}}}"


CHART_CSS = (
    "svg.chart{font:13px system-ui,sans-serif;color:var(--ink)} svg.chart text{fill:var(--ink)} "
    "svg.chart .tick{fill:var(--faint)} svg.chart .grid{stroke:var(--line);stroke-width:1} "
    "svg.chart .iso{stroke:var(--faint);stroke-width:1;stroke-dasharray:1 4} "
    "svg.chart .iso-label{font-size:11px;fill:var(--faint)} svg.chart .leader{stroke:var(--faint);stroke-width:.75} "
    "svg.chart .series:focus{outline:none} "
    "svg.chart:has(.series:hover) .series:not(:hover){opacity:.15} "
    "svg.chart:has(.series:focus-visible) .series:not(:focus-visible){opacity:.15}"
)


def as_file(svg: str) -> str:
    """A chart that stands alone, on a ground of its own."""
    style = f"<style>{css_variables()} {CHART_CSS}</style><rect width='100%' height='100%' fill='var(--paper)'/>"
    start, end, rest = svg.partition(">")
    return start.replace("<svg ", "<svg xmlns='http://www.w3.org/2000/svg' ", 1) + end + style + rest


def curves(series: Sequence[Series], *, x_label: str, y_label: str, description: str) -> str:
    """Lines through points, in order of x."""
    axes = _Axes([point for one in series for point in one.points], y_from_zero=False)
    parts = []
    for one in series:
        at = [axes.place(x, y) for x, y in one.points]
        line = " ".join(f"{x:.1f},{y:.1f}" for x, y in at)
        marks = "".join(f"<circle cx='{x:.1f}' cy='{y:.1f}' r='2.2' fill='{_colour(one)}'/>" for x, y in at)
        parts.append((one, f"<polyline points='{line}' fill='none' stroke='{_colour(one)}' stroke-width='2' "
                           f"stroke-dasharray='{_dash(one)}'/>{marks}"))  # fmt: skip
    return _chart(axes, parts, x_label, y_label, description)


def scatter(series: Sequence[Series], *, x_label: str, y_label: str, description: str, sum_label: str) -> str:
    """One point for each series, with its title beside it, over lines on which x plus y is constant.

    Args:
        sum_label: what x plus y is, before the value of each line; "" leaves these lines out.
    """
    axes = _Axes([point for one in series for point in one.points], y_from_zero=True)
    places = [axes.place(*point) for one in series for point in one.points]
    taken = [_box_of_mark(x, y) for x, y in places]
    # from above to below: the right side, which is tried first, is then free for most
    down = sorted(range(len(series)), key=lambda i: places[i][1])
    labels = {i: _label(series[i].title, *places[i], taken) for i in down}
    parts = [(one, labels[i] + _mark(one, *places[i])) for i, one in enumerate(series)]
    below = _lines_of_equal_sum(axes, sum_label, taken) if sum_label else ""
    return _chart(axes, parts, x_label, y_label, description, below=below, legend=False)


class _Axes:
    """Where values lie in the picture, and round numbers to write at the axes."""

    def __init__(self, points: Sequence[tuple[float, float]], *, y_from_zero: bool):
        xs, ys = zip(*points)
        self.x_ticks, self.y_ticks = ticks(xs, from_zero=True), ticks(ys, y_from_zero)

    def place(self, x: float, y: float) -> tuple[float, float]:
        across = (x - self.x_ticks[0]) / (self.x_ticks[-1] - self.x_ticks[0])
        up = (y - self.y_ticks[0]) / (self.y_ticks[-1] - self.y_ticks[0])
        return LEFT + across * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM - up * (HEIGHT - TOP - BOTTOM)

    def draw(self, x_label: str, y_label: str) -> str:
        parts = []
        bottom, right = HEIGHT - BOTTOM, WIDTH - RIGHT
        for tick in self.x_ticks:
            x, _ = self.place(tick, self.y_ticks[0])
            parts.append(f"<line class='grid' x1='{x:.1f}' y1='{TOP}' x2='{x:.1f}' y2='{bottom}'/>")
            anchor = "end" if tick == self.x_ticks[-1] else "middle"
            parts.append(
                f"<text class='tick' x='{x:.1f}' y='{bottom + 18}' text-anchor='{anchor}'>{number(tick)}</text>"
            )
        for tick in self.y_ticks:
            _, y = self.place(self.x_ticks[0], tick)
            parts.append(f"<line class='grid' x1='{LEFT}' y1='{y:.1f}' x2='{right}' y2='{y:.1f}'/>")
            parts.append(f"<text class='tick' x='{LEFT - 6}' y='{y + 4:.1f}' text-anchor='end'>{number(tick)}</text>")
        middle_x, middle_y = (LEFT + right) / 2, (TOP + bottom) / 2
        parts.append(f"<text x='{middle_x}' y='{HEIGHT - 10}' text-anchor='middle'>{escape(x_label)}</text>")
        parts.append(
            f"<text transform='translate(15 {middle_y}) rotate(-90)' text-anchor='middle'>{escape(y_label)}</text>"
        )
        return "".join(parts)


def ticks(values: Sequence[float], from_zero: bool = False, about: int = 5) -> list[float]:
    """Round numbers, evenly spaced, the first at or below all values and the last at or above them; at least two.

    from_zero: begin at 0, unless all values are far from it.
    """
    low, high = min(values), max(values)
    if from_zero and 0 <= low < NEAR_ZERO * high:
        low = 0.0
    if high - low <= 1e-9 * max(abs(low), abs(high)):
        low, high = low - abs(low or 1) / 10, high + abs(high or 1) / 10
    rough = (high - low) / about
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    decimals = 2 - math.floor(math.log10(step))
    return [round(step * i, max(10, decimals)) for i in range(first, last + 1)]


def number(value: float) -> str:
    """A tick: 1,500 or 0.25."""
    return f"{value:,.0f}" if value == round(value) else f"{value:.6g}"


def _chart(axes, parts, x_label, y_label, description, *, below="", legend=True) -> str:
    rows = math.ceil(len(parts) / LEGEND_COLUMNS) if legend else 0
    height = HEIGHT + rows * LINE_HEIGHT + (6 if rows else 0)
    drawn = []
    for position, (one, shapes) in enumerate(parts):
        if legend:
            x = LEFT / 2 + (position // rows) * (WIDTH - LEFT / 2) / LEGEND_COLUMNS
            y = HEIGHT + 6 + (position % rows) * LINE_HEIGHT + LINE_HEIGHT / 2
            shapes += _legend_item(one, x, y)
        drawn.append(f"<g class='series' tabindex='0'><title>{escape(one.title)}</title>{shapes}</g>")
    return (
        f"<svg class='chart' viewBox='0 0 {WIDTH} {height}' role='img' aria-label='{escape(description, quote=True)}'>"
        f"{axes.draw(x_label, y_label)}{below}{''.join(drawn)}</svg>"
    )


def _legend_item(one: Series, x: float, y: float) -> str:
    mark = (
        f"<line x1='{x:.1f}' y1='{y:.1f}' x2='{x + 24:.1f}' y2='{y:.1f}' stroke='{_colour(one)}' stroke-width='3' "
        f"stroke-dasharray='{_dash(one)}'/>"
    )
    text = f"<text x='{x + 30:.1f}' y='{y + 4:.1f}'>{escape(one.title)}</text>"
    # something to point at
    area = (
        f"<rect x='{x:.1f}' y='{y - LINE_HEIGHT / 2:.1f}' width='{(WIDTH - LEFT) / LEGEND_COLUMNS:.1f}' "
        f"height='{LINE_HEIGHT}' fill='transparent'/>"
    )
    return area + mark + text


def _colour(one: Series) -> str:
    return f"var(--s{one.number % len(PALETTE)})"


def _dash(one: Series) -> str:
    return DASHES[one.number // len(PALETTE) % len(DASHES)]


def _mark(one: Series, x: float, y: float) -> str:
    """A disc, a square or a diamond."""
    shape = one.number // len(PALETTE) % 3
    if shape == 0:
        return f"<circle cx='{x:.1f}' cy='{y:.1f}' r='{MARK}' fill='{_colour(one)}'/>"
    turn = "" if shape == 1 else f" transform='rotate(45 {x:.1f} {y:.1f})'"
    side = 2 * MARK - 1
    place = f"x='{x - side / 2:.1f}' y='{y - side / 2:.1f}' width='{side}' height='{side}'"
    return f"<rect {place} fill='{_colour(one)}'{turn}/>"


Box = tuple[float, float, float, float]  # left, top, right, bottom


def _lines_of_equal_sum(axes: _Axes, label: str, taken: list[Box]) -> str:
    """Dotted lines x + y = constant, each with its value where it enters the picture, unless something is there."""
    x_low, x_high, y_low, y_high = axes.x_ticks[0], axes.x_ticks[-1], axes.y_ticks[0], axes.y_ticks[-1]
    parts = []
    for total in ticks((x_low + y_low, x_high + y_high), about=8)[1:-1]:
        left = (x_low, total - x_low) if total - x_low <= y_high else (total - y_high, y_high)
        right = (total - y_low, y_low) if total - y_low <= x_high else (x_high, total - x_high)
        (x1, y1), (x2, y2) = axes.place(*left), axes.place(*right)
        parts.append(f"<line class='iso' x1='{x1:.1f}' y1='{y1:.1f}' x2='{x2:.1f}' y2='{y2:.1f}'/>")
        text = f"{label} {number(total)}"
        box = _box_of_text(text, x1 + 5, y1 + 13)
        if box[2] < WIDTH and not any(_overlap(box, other) for other in taken):
            parts.append(f"<text class='iso-label' x='{x1 + 5:.1f}' y='{y1 + 13:.1f}'>{escape(text)}</text>")
            taken.append(box)
    return "".join(parts)


def _box_of_mark(x: float, y: float) -> Box:
    return x - MARK, y - MARK, x + MARK, y + MARK


def _box_of_text(text: str, x: float, baseline: float) -> Box:
    return x, baseline - LABEL_SIZE + 1, x + len(text) * LETTER_WIDTH, baseline + 3


def _label(title: str, x: float, y: float, taken: list[Box]) -> str:
    """The title where it covers least of what is there, with a line to its point if that is not beside it."""
    width, gap, line = len(title) * LETTER_WIDTH, MARK + 3, LABEL_SIZE + 3
    places = [
        (left, y + 4 + lift * line)
        for lift in (0, 1, -1, 2, -2, 3, -3, 4, -4)
        for left in (x - width / 2, *(x + gap + away for away in AWAY), *(x - gap - away - width for away in AWAY))
        if lift or left != x - width / 2
    ]

    def cost(place: tuple[float, float]) -> float:
        box = _box_of_text(title, *place)
        right, bottom = WIDTH - RIGHT, HEIGHT - BOTTOM
        outside = max(0, LEFT - box[0]) + max(0, box[2] - right) + max(0, TOP - box[1]) + max(0, box[3] - bottom)
        return 100 * outside + sum(_overlap(box, other) for other in taken) + math.dist((x, y), _nearest(box, x, y))

    left, baseline = min(places, key=cost)
    box = _box_of_text(title, left, baseline)
    taken.append(box)
    near = _nearest(box, x, y)
    leader = ""
    if math.dist((x, y), near) > 2 * gap:
        leader = f"<line class='leader' x1='{x:.1f}' y1='{y:.1f}' x2='{near[0]:.1f}' y2='{near[1]:.1f}'/>"
    return f"{leader}<text x='{left:.1f}' y='{baseline:.1f}' font-size='{LABEL_SIZE}'>{escape(title)}</text>"


def _nearest(box: Box, x: float, y: float) -> tuple[float, float]:
    return min(max(x, box[0]), box[2]), min(max(y, box[1]), box[3])


def _overlap(a: Box, b: Box) -> float:
    return max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
