"""Charts as SVG texts, without a library: they follow the colours and the font of the page.

A chart is `<svg role="img">` with a title for screen readers; colours are CSS variables, defined
for light and dark in `STYLE`, and every mark carries its numbers as a tooltip.
"""

import math
from html import escape

WIDTH = 440
STYLE = """
svg.chart{--ink:#1f2328;--soft:#59636e;--grid:#d8dee4;--a:#0b63b0;--b:#b35900;--c:#0a7a5c;--bg:#fff;
 font:12px system-ui,sans-serif;width:100%;height:auto;display:block}
@media (prefers-color-scheme:dark){svg.chart{--ink:#e6edf3;--soft:#9aa7b4;--grid:#323a45;
 --a:#6cb6ff;--b:#ffb15c;--c:#56d4a8;--bg:#161b22}}
.chart text{fill:var(--soft)}.chart .ink{fill:var(--ink)}.chart .grid{stroke:var(--grid)}
.chart .line{stroke:var(--a);fill:none;stroke-width:2}
.chart .mark{stroke:var(--bg);stroke-width:1.5}
.chart .a{fill:var(--a)}.chart .b{fill:var(--b)}.chart .c{fill:var(--c)}
.chart .level{stroke:var(--b);stroke-width:1.5}
.chart .limit{stroke:var(--soft);stroke-dasharray:4 4}
@media (max-width:480px){svg.chart{font-size:15px}}
"""


def standalone(chart):
    """A chart as the content of an SVG file of its own."""
    style = f"<style>{STYLE}svg.chart{{background:var(--bg)}}</style>"
    head, _, rest = chart.partition(">")
    return f'{head} xmlns="http://www.w3.org/2000/svg">{style}{rest}\n'


def line_chart(points, titles, xlabel, ylabel, marked=None, limit=None, log_y=False):
    """A line through points.

    Args:
        points: List of `(x, y)` by rising x.
        titles: The tooltip of each.
        xlabel, ylabel: Names of the axes.
        marked: Index of the point that stands out, or `None`.
        limit: An x at which a dashed line stands, or `None`.
        log_y: Whether the y axis is logarithmic, where all values are positive.

    Returns:
        The chart, a text.
    """
    height, left, right, top, bottom = 260, 62, 14, 26, 40
    xs = [x for x, _ in points] + ([] if limit is None else [limit])
    ys = [y for _, y in points]
    log_y = log_y and min(ys) > 0 and max(ys) / min(ys) > 3
    x_ticks = ticks(min(xs), max(xs))
    y_ticks = log_ticks(min(ys), max(ys)) if log_y else ticks(min(min(ys), 0), max(ys))
    across = _scale(x_ticks[0], x_ticks[-1], left, WIDTH - right)
    up = _scale(y_ticks[0], y_ticks[-1], height - bottom, top, log_y)
    body = [f'<text x="{left - 56}" y="14">{escape(ylabel)}</text>']
    for tick in y_ticks:
        y = up(tick)
        body.append(f'<path class="grid" d="M{left} {y:.1f}H{WIDTH - right}"/>')
        body.append(f'<text x="{left - 6}" y="{y + 4:.1f}" text-anchor="end">{tick:g}</text>')
    for tick in x_ticks:
        x, y = across(tick), height - bottom + 16
        body.append(f'<text x="{x:.1f}" y="{y}" text-anchor="middle">{tick:g}</text>')
    middle = (left + WIDTH - right) / 2
    body.append(f'<text x="{middle}" y="{height - 6}" text-anchor="middle">{escape(xlabel)}</text>')
    if limit is not None:
        body.append(f'<path class="limit" d="M{across(limit):.1f} {top}V{height - bottom}"/>')
    places = [(across(x), up(y)) for x, y in points]
    body.append(f'<path class="line" d="M{"L".join(f"{x:.1f} {y:.1f}" for x, y in places)}"/>')
    for i, ((x, y), title) in enumerate(zip(places, titles, strict=True)):
        kind, radius = ("b", 6.5) if i == marked else ("a", 4)
        body.append(
            f'<circle class="mark {kind}" cx="{x:.1f}" cy="{y:.1f}" r="{radius}">'
            f"<title>{escape(title)}</title></circle>"
        )
    return _chart(f"{ylabel} against {xlabel}", height, body)


def dot_chart(rows, series, xlabel):
    """Rows of dots on one axis, one dot for each series: few numbers for many layers.

    Args:
        rows: List of `(name, values)`; a value of `None` or infinity has no dot.
        series: Names of the series, three at most, for the legend.
        xlabel: Name of the axis.

    Returns:
        The chart, a text.
    """
    step, left, right, top = 34, 12, 14, 44
    height = top + step * len(rows) + 34
    values = [v for _, found in rows for v in found if v is not None and math.isfinite(v)] or [0]
    x_ticks = ticks(min(0, *values), max(0, *values))
    across = _scale(x_ticks[0], x_ticks[-1], left + 8, WIDTH - right)
    body, x = [], float(left)
    for kind, name in zip("abc", series, strict=False):
        body.append(_dot(kind, x + 6, 14) + f'<text x="{x + 18}" y="18">{escape(name)}</text>')
        x += 36 + 8 * len(name)
    for tick in x_ticks:
        x, end = across(tick), height - 34
        body.append(f'<path class="grid" d="M{x:.1f} {top - 14}V{end}"/>')
        body.append(f'<text x="{x:.1f}" y="{end + 14}" text-anchor="middle">{tick:g}</text>')
    body.append(f'<text x="{WIDTH / 2}" y="{height - 4}" text-anchor="middle">{xlabel}</text>')
    for i, (name, found) in enumerate(rows):
        y = top + step * i
        body.append(f'<text class="ink" x="{left}" y="{y}">{escape(name)}</text>')
        body.append(f'<path class="grid" d="M{left + 8} {y + 12}H{WIDTH - right}"/>')
        for place, (kind, label, value) in enumerate(zip("abc", series, found, strict=False)):
            if value is not None and math.isfinite(value):
                title = f"{name}, {label}: {value:.1f}"
                shift = 4 * (place - (len(series) - 1) / 2)  # marks of equal values stay apart
                body.append(_dot(kind, across(value), y + 12 + shift, title))
    return _chart(f"{', '.join(series)} of every layer, {xlabel}", height, body)


def _dot(kind, x, y, title=""):
    """Series differ by shape too, not by colour alone."""
    inner = f"<title>{escape(title)}</title>" if title else ""
    if kind == "a":
        return f'<circle class="mark a" cx="{x:.1f}" cy="{y}" r="5.5">{inner}</circle>'
    if kind == "b":
        return (
            f'<rect class="mark b" x="{x - 5:.1f}" y="{y - 5}" width="10" height="10">'
            f"{inner}</rect>"
        )
    return f'<path class="mark c" d="M{x:.1f} {y - 7}l6.5 11.5h-13z">{inner}</path>'


def histogram(counts, low, high, title, levels=(), kind="a"):
    """A histogram, with a line at every quantization level.

    Args:
        counts: Counts of equal bins from `low` to `high`.
        low, high: Ends of the axis.
        title: What it shows, for the caption.
        levels: Numbers at which lines stand; those outside are left out.
        kind: Colour, `"a"`, `"b"` or `"c"`.

    Returns:
        The chart, a text.
    """
    height, left, right, top, bottom = 150, 8, 8, 24, 22
    across = _scale(low, high, left, WIDTH - right)
    tallest = max(max(counts), 1)
    width = (WIDTH - left - right) / len(counts)
    body = [f'<text x="{left}" y="14">{escape(title)}</text>']
    for i, count in enumerate(counts):
        # Square roots, so that the tails, where outliers are, can be seen.
        size = (height - top - bottom) * math.sqrt(count / tallest)
        if count:
            size = max(size, 1)
            edge = low + (high - low) * i / len(counts)
            body.append(
                f'<rect class="{kind}" x="{left + i * width:.1f}" y="{height - bottom - size:.1f}" '
                f'width="{max(width - 1, 0.5):.1f}" height="{size:.1f}">'
                f"<title>from {edge:.3g}: {count}</title></rect>"
            )
    body.append(f'<path class="grid" d="M{left} {height - bottom}H{WIDTH - right}"/>')
    for level in levels:
        if low <= level <= high:
            x = across(level)
            body.append(f'<path class="level" d="M{x:.1f} {top}V{height - bottom}"/>')
    for anchor, x, value in (("start", left, low), ("middle", across((low + high) / 2),
                             (low + high) / 2), ("end", WIDTH - right, high)):  # fmt: skip
        body.append(f'<text x="{x:.1f}" y="{height - 6}" text-anchor="{anchor}">{value:.3g}</text>')
    return _chart(f"Histogram: {title}", height, body)


def profile(values, marked, title):
    """Bars from left to right, some of them marked; of many neighbours the tallest is shown.

    Args:
        values: Numbers of at least 0.
        marked: Set of indices that stand out.
        title: What it shows, for the caption.

    Returns:
        The chart, a text.
    """
    height, left, right, top, bottom = 150, 8, 8, 24, 22
    stride = -(-len(values) // ((WIDTH - left - right) // 2))
    groups = [range(i, min(i + stride, len(values))) for i in range(0, len(values), stride)]
    width = (WIDTH - left - right) / len(groups)
    tallest = max(values, default=0) or 1
    body = [f'<text x="{left}" y="14">{escape(title)}</text>']
    for i, group in enumerate(groups):
        best = max(group, key=lambda index: values[index])
        size = max((height - top - bottom) * values[best] / tallest, 0.5)
        kind = "b" if marked.intersection(group) else "a"
        body.append(
            f'<rect class="{kind}" x="{left + i * width:.1f}" y="{height - bottom - size:.1f}" '
            f'width="{max(width * 0.8, 1):.1f}" height="{size:.1f}">'
            f"<title>channel {best}: {values[best]:.3g}</title></rect>"
        )
    body.append(f'<path class="grid" d="M{left} {height - bottom}H{WIDTH - right}"/>')
    for anchor, x, index in (("start", left, 0), ("end", WIDTH - right, len(values) - 1)):
        body.append(f'<text x="{x}" y="{height - 6}" text-anchor="{anchor}">{index}</text>')
    return _chart(title, height, body)


def _chart(title, height, body):
    return (
        f'<svg class="chart" role="img" viewBox="0 0 {WIDTH} {height}" '
        f'aria-label="{escape(title)}">{"".join(body)}</svg>'
    )


def _scale(low, high, start, end, log=False):
    """A function from numbers to places."""
    if log:
        low, high = math.log10(low), math.log10(high)
    span = (high - low) or 1.0

    def place(value):
        value = math.log10(value) if log else value
        return start + (value - low) / span * (end - start)

    return place


def ticks(low, high, count=5):
    """Round numbers that cover a range, about `count` of them."""
    if high - low < 1e-12 * max(abs(low), abs(high), 1e-300):
        low, high = low - (abs(low) or 1) / 2, high + (abs(high) or 1) / 2
    rough = (high - low) / count
    power = 10 ** math.floor(math.log10(rough))
    step = next(power * f for f in (1, 2, 2.5, 5, 10) if power * f >= rough * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 12) + 0.0 for i in range(first, last + 1)]


def log_ticks(low, high):
    """Powers of ten that cover a range of positive numbers, every second or third if many."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    stride = max(1, math.ceil((last - first) / 6))
    last = first + max(stride, math.ceil((last - first) / stride) * stride)
    return [10.0**i for i in range(first, last + 1, stride)]
