"""A `QuantizationReport` as one page: no script, no other file, light and dark, wide and narrow."""

import math
from html import escape

from keras_bitnet.report import svg

_CSS = """
:root{color-scheme:light dark;--page:#f6f8fa;--card:#fff;--text:#1f2328;--muted:#59636e;
 --line:#d8dee4;--accent:#0b63b0;--bad:#b3261e;--good:#0a7a5c}
@media (prefers-color-scheme:dark){:root{--page:#0d1117;--card:#161b22;--text:#e6edf3;
 --muted:#9aa7b4;--line:#323a45;--accent:#6cb6ff;--bad:#ff9b93;--good:#56d4a8}}
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--text);font:16px/1.5 system-ui,sans-serif}
main{max-width:1240px;margin:0 auto;padding:24px 16px 64px}
h1{font-size:1.6rem;line-height:1.25;margin:8px 0 4px;overflow-wrap:anywhere}
h2{font-size:1.15rem;margin:0 0 4px}
p{margin:0 0 12px;color:var(--muted);max-width:68ch}
section{background:var(--card);border:1px solid var(--line);border-radius:12px;padding:20px;
 margin-top:16px}
.figures{display:grid;grid-template-columns:repeat(auto-fit,minmax(150px,1fr));gap:12px;
 margin:20px 0 0;padding:0}
.figures div{background:var(--card);border:1px solid var(--line);border-radius:12px;
 padding:14px 16px;min-width:0}
dt{color:var(--muted);font-size:.85rem}
dd{margin:2px 0 0;font-size:1.35rem;font-weight:600;font-variant-numeric:tabular-nums;
 overflow-wrap:anywhere}
dd small{font-size:.8rem;font-weight:400;color:var(--muted)}
.charts{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,400px),1fr));gap:16px}
.charts section{margin:0;min-width:0}.charts{margin-top:16px}
.charts section:last-child:nth-child(odd){grid-column:1/-1}
.charts .chart{max-width:640px;margin:0 auto}
.scroll{overflow-x:auto;margin:0 -20px -8px;padding:0 20px 8px}
.scroll:focus-visible,summary:focus-visible{outline:2px solid var(--accent);outline-offset:2px}
table{border-collapse:collapse;font-size:.9rem;font-variant-numeric:tabular-nums;width:100%}
th,td{padding:7px 10px;text-align:right;white-space:nowrap;border-bottom:1px solid var(--line)}
thead th{color:var(--muted);font-weight:500;vertical-align:bottom}
th:first-child,th:nth-child(2),td:nth-child(2){text-align:left}
tbody th{font-weight:600;position:sticky;left:0;background:var(--card);max-width:42vw;
 overflow:hidden;text-overflow:ellipsis}
td.worst{color:var(--bad);font-weight:600}
td.best{color:var(--good);font-weight:600}
td.words,th.words{text-align:left}td.words{white-space:normal;min-width:15em}
details{border-top:1px solid var(--line)}
details:first-of-type{border-top:0}
summary{cursor:pointer;padding:10px 0;font-weight:600;overflow-wrap:anywhere}
summary span{font-weight:400;color:var(--muted)}
details .charts{margin:0 0 16px;grid-template-columns:repeat(auto-fill,minmax(min(100%,340px),1fr))}
footer{margin-top:24px;color:var(--muted);font-size:.85rem}
@media print{section,.figures div{break-inside:avoid}}
"""
_COLUMNS = (
    # header, its explanation, text of a layer, number (lowest is worst: -1, highest: 1, or 0)
    ("Precision", "bits of weights and inputs", lambda r: r.precision, None),
    ("Weights", "numbers in the kernel", lambda r: f"{r.weights:,}", None),
    ("Weight dB", "SQNR of the kernel", lambda r: decibel(r.weight.sqnr),
     lambda r: -r.weight.sqnr),
    ("Input dB", "SQNR of the quantized inputs", lambda r: decibel(r.input_sqnr),
     lambda r: -_or(r.input_sqnr, math.inf)),
    ("Output dB", "SQNR of the outputs in the quantized model",
     lambda r: decibel(r.output.sqnr), lambda r: -r.output.sqnr),
    ("Cosine", "between the outputs and those of the float model",
     lambda r: f"{r.output.cosine:.4f}", lambda r: -r.output.cosine),
    ("MSE", "mean squared error of the outputs", lambda r: f"{r.output.mse:.2e}", None),
    ("Max error", "largest error of an output", lambda r: f"{r.output.max_error:.3g}", None),
    ("Zeros", "share of weights that become 0", lambda r: f"{r.share_zero:.1%}", None),
    ("Outlier channels", "inputs more than 6 times the median channel",
     lambda r: outlier_count(r), lambda r: len(r.outliers.channels) if r.outliers else 0),
    ("Outlier weights", "more than 6 standard deviations from 0",
     lambda r: f"{r.weight_outliers:.2%}", lambda r: r.weight_outliers),
    ("Sensitivity", "relative squared error of the model when only this layer is quantized",
     lambda r: f"{r.sensitivity:.2e}", lambda r: r.sensitivity),
)  # fmt: skip


def decibel(value):
    """A ratio in dB for people: `31.2`, `∞` for no error at all, `-` for unknown."""
    if value is None:
        return "-"
    if math.isfinite(value):
        return f"{value:.1f}"
    return "NaN" if math.isnan(value) else ("∞" if value > 0 else "-∞")


def outlier_count(row):
    """The number of outlier channels of a layer, `-` where it has no inputs to quantize."""
    if row.outliers:
        return str(len(row.outliers.channels))
    return "-" if row.input_absmax is None else "0"


def channel_list(outliers, most):
    """Outlier channels for people: `3 (12.4x), 7 (8.1x)`, the first of them."""
    shown = ", ".join(f"{c.index} ({c.ratio:.1f}x)" for c in outliers.channels[:most])
    more = len(outliers.channels) - most
    return shown + (f" and {more} more" if more > 0 else "")


def page(report):
    """The page of a `QuantizationReport`, a text."""
    title = escape(f"Quantization of {report.name}")
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{title}</title>\n<style>{_CSS}{svg.STYLE}</style>\n</head>\n<body>\n<main>\n"
        f"<header>\n<h1>{title}</h1>\n<p>Measured on {report.samples} examples against the float "
        f"model.</p>\n</header>\n{_figures(report)}\n{_charts(report)}\n{_table(report)}\n"
        f"{_outliers(report)}\n{_details(report)}\n<footer>Made by keras_bitnet. SQNR is "
        "the power of a signal over that of its quantization error, in decibels: 10 dB more is a "
        "tenth of the error.</footer>"
        "\n</main>\n</body>\n</html>\n"
    )


def _figures(report):
    worst = _most_sensitive(report)
    figures = [
        ("SQNR of the outputs", f"{decibel(report.output.sqnr)} <small>dB</small>"),
        ("Cosine to float", f"{report.output.cosine:.4f}"),
        ("Most sensitive layer", escape(worst.path)),
        ("Quantized layers", str(len(report.layers))),
    ]
    if report.loss is not None:
        was = f"<small>float {report.loss_float:.4g}</small>"
        figures.insert(0, ("Loss", f"{report.loss:.4g} {was}"))
    cells = "".join(f"<div><dt>{name}</dt><dd>{value}</dd></div>" for name, value in figures)
    return f'<dl class="figures">{cells}</dl>'


def _most_sensitive(report):
    return max(report.layers, key=lambda row: row.sensitivity)


def _charts(report):
    rows = [(r.path, (r.weight.sqnr, r.input_sqnr, r.output.sqnr)) for r in report.layers]
    parts = [
        _section(
            "Error, layer by layer",
            "SQNR in dB, more is better. The outputs carry the errors of all layers before.",
            svg.dot_chart(rows, ("weights", "inputs", "outputs"), "dB"),
        ),
        _section(
            "Sensitivity",
            "SQNR of the model when only this layer is quantized; the most sensitive first.",
            svg.dot_chart(_sensitivities(report), ("outputs of the model",), "dB"),
        ),
    ]
    if report.search is not None:
        parts.append(
            _section(
                "Cost and error",
                "The best plans for other budgets. The large mark is the plan in use, the dashed "
                "line the budget.",
                report.search.chart(),
            )
        )
    return f'<div class="charts">{"".join(parts)}</div>'


def _sensitivities(report):
    rows = sorted(report.layers, key=lambda row: -row.sensitivity)
    return [
        (r.path, (-10 * math.log10(r.sensitivity) if r.sensitivity else math.inf,)) for r in rows
    ]


def _section(title, text, body):
    return f"<section>\n<h2>{title}</h2>\n<p>{text}</p>\n{body}\n</section>\n"


def _table(report):
    heads = "".join(
        f'<th scope="col"><abbr title="{escape(help_)}" style="text-decoration:none">{name}</abbr>'
        "</th>"
        for name, help_, _, _ in _COLUMNS
    )
    worst = [_worst(report.layers, key) for *_, key in _COLUMNS]
    lines = []
    for i, row in enumerate(report.layers):
        cells = "".join(
            f"<td{' class=worst' if i == bad else ''}>{escape(text(row))}</td>"
            for (_, _, text, _), bad in zip(_COLUMNS, worst, strict=True)
        )
        lines.append(
            f'<tr><th scope="row" title="{escape(row.path)}">{escape(row.path)}</th>{cells}</tr>'
        )
    return _section(
        "All figures",
        "The worst of a column is in red where there is one.",
        _scrolled("All figures", heads, lines),
    )


def _scrolled(name, heads, lines):
    """A table of rows as texts that scrolls sideways where the page is narrow."""
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{name}"><table><thead><tr>'
        f'<th scope="col">Layer</th>{heads}</tr></thead><tbody>{"".join(lines)}</tbody></table>'
        "</div>"
    )


def _outliers(report):
    rows = [row for row in report.layers if row.outliers]
    if not rows:
        return ""
    names = list(dict.fromkeys(name for row in rows for name in row.outliers.product_sqnr))
    heads = "".join(
        f'<th scope="col"{" class=words" if name == "Suggestion" else ""}>'
        f"{escape(name.replace('_', ' '))}</th>"
        for name in ("Channels", "Suggestion", *names)
    )
    lines = []
    for row in rows:
        found = row.outliers
        values = "".join(
            f"<td{' class=best' if name == found.suggestion else ''}>"
            f"{decibel(found.product_sqnr.get(name))}</td>"
            for name in names
        )
        lines.append(
            f'<tr><th scope="row" title="{escape(row.path)}">{escape(row.path)}</th>'
            f"<td>{escape(channel_list(found, 4))}</td>"
            f'<td class="words">{escape(found.how) or "-"}</td>{values}</tr>'
        )
    return _section(
        "Outlier channels",
        "Inputs much larger than the median channel, and the SQNR in dB of the product of the "
        "layer: as it is (none), and with a treatment of its inputs, measured without training.",
        _scrolled("Outlier channels", heads, lines),
    )


def _worst(layers, key):
    """Index of the layer with the highest key, or `None` if all are alike."""
    if key is None or len({key(row) for row in layers}) < 2:
        return None
    return max(range(len(layers)), key=lambda i: key(layers[i]))


def _details(report):
    parts = []
    worst = _most_sensitive(report)
    for row in report.layers:
        charts = "".join(f"<div>{chart}</div>" for chart in _distributions(row))
        opened = " open" if row is worst else ""
        parts.append(
            f"<details{opened}><summary>{escape(row.path)} <span>{escape(row.type)}, "
            f'{escape(row.precision)}</span></summary><div class="charts">{charts}</div></details>'
        )
    return _section(
        "Distributions",
        "Heights are square roots of counts, so that outliers can be seen.",
        "".join(parts),
    )


def _distributions(row):
    weights, inputs = row.weight_histogram, row.input_histogram
    levels = " and the levels they are rounded to" if weights.levels else ""
    title = f"Weights{levels}"
    yield svg.histogram(weights.counts, weights.low, weights.high, title, weights.levels)
    if inputs is not None:
        title = f"Inputs, largest magnitude {row.input_absmax:.3g}"
        yield svg.histogram(inputs.counts, inputs.low, inputs.high, title, kind="c")
    if row.outliers:
        marked = {channel.index for channel in row.outliers.channels}
        yield svg.profile(row.channels, marked, "Largest magnitude of each input channel")


def _or(value, other):
    return other if value is None else value
