"""Tables for people, by `rich` where it is installed, else aligned text; that of a summary."""

import importlib.util
from typing import Any

from keras_bitnet.report.macs import format_bits

HEADERS = ("Layer (type)", "Output shape", "Bits W/A", "State", "Params", "Now", "Packed",
           "float32", "MACs")  # fmt: skip
_TEXT_COLUMNS = 4  # the first ones are aligned to the left, the numbers after them to the right


def of_summary(data):
    """The table of a `ModelSummary`: arguments of `print_table`."""
    return {
        "headers": HEADERS,
        "lines": [_cells(row) for row in data.rows],
        "title": f"Model: {data.name}",
        "left": _TEXT_COLUMNS,
        "styles": [{"packed": "green", "QAT": "cyan"}.get(row.state) for row in data.rows],
        "footer": _footer(data.totals),
    }


def print_table(headers, lines, title, left=1, styles=None, footer=()):
    """Prints a table, by `rich` where that is installed.

    Args:
        headers: Names of the columns.
        lines: Lists of cells, texts.
        title: Line above it.
        left: How many columns, the first ones, are aligned to the left; the others to the right.
        styles: A `rich` style or `None` for each line, none by default.
        footer: Lines below it.
    """
    if importlib.util.find_spec("rich") is None:
        print(text_table(headers, lines, title, left, styles, footer))
    else:
        _print_rich(headers, lines, title, left, styles or [None] * len(lines), footer)


def text_table(headers, lines, title, left=1, styles=None, footer=()):
    """A table as aligned text; arguments as for `print_table`, text has no styles."""
    widths = [max(map(len, column)) for column in zip(headers, *lines, strict=True)]
    text = [
        "  ".join(
            cell.ljust(width) if i < left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in (headers, *lines)
    ]
    rule = "-" * (sum(widths) + 2 * (len(widths) - 1))
    return "\n".join([title, rule, text[0], rule, *text[1:], rule, *footer])


def _print_rich(headers, lines, title, left, styles, footer):
    import rich.box
    import rich.console
    import rich.measure
    import rich.table

    table = rich.table.Table(title=title, title_justify="left", box=rich.box.ROUNDED)
    for i, header in enumerate(headers):
        justify: Any = "left" if i < left else "right"
        table.add_column(header, justify=justify, no_wrap=True)
    for line, style in zip(lines, styles, strict=True):
        table.add_row(*map(_literal, line), style=style)
    console = rich.console.Console()
    if not console.is_terminal:  # a file or a pipe has no width: do not cut
        options = console.options.update(max_width=10_000)
        console.width = rich.measure.Measurement.get(console, options, table).maximum
    console.print(table)
    for line in footer:
        console.print(line, markup=False, highlight=False)


def _literal(cell):
    import rich.text

    return rich.text.Text(cell)


def _cells(row):
    name = row.path if row.depth == 0 else "  " * row.depth + row.path.rpartition("/")[2]
    calls = f" x{row.calls}" if row.calls and row.calls > 1 else ""
    state = f"{row.state} {row.strength:.2f}" if row.strength is not None else row.state
    macs = [f"{_count(n)} {name}" for name, n in row.macs_by_precision.items() if n]
    return (
        f"{name} ({row.type}){calls}",
        "-" if row.output_shape is None else str(row.output_shape),
        _bits(row),
        state,
        f"{row.parameters:,}",
        *(format_bytes(n) for n in (row.bytes_stored, row.bytes_packed, row.bytes_float32)),
        " + ".join(macs) if row.macs is not None and macs else "-",
    )


def _bits(row):
    if row.weight_bits is None:
        return "-"
    inputs = "-" if row.activation_bits is None else row.activation_bits
    return f"{format_bits(row.weight_bits)}/{inputs}"


def _footer(totals):
    parameters = _shares(totals.parameters_by_precision, totals.parameters)
    now, packed, disk, float32 = map(
        format_bytes,
        (totals.bytes_stored, totals.bytes_packed, totals.bytes_on_disk, totals.bytes_float32),
    )
    lines = [
        f"Parameters: {totals.parameters:,}{parameters}",
        f"Memory: {now} now, {packed} packed ({disk} on disk), {float32} in float32",
    ]
    if totals.compression is not None:
        lines.append(f"Compression: {totals.compression:.2f}x of float32 in memory")
    if totals.reason:
        return [*lines, f"MACs: not known, {totals.reason}"]
    low_bit = f", {totals.low_bit_share:.1%} low-bit" if totals.low_bit_share is not None else ""
    macs = _shares(totals.macs_by_precision, totals.macs)
    lines.append(f"MACs of one example: {totals.macs:,}{macs}{low_bit}")
    if totals.not_counted:
        shown = ", ".join(totals.not_counted[:5])
        more = f" and {len(totals.not_counted) - 5} more" if len(totals.not_counted) > 5 else ""
        lines.append(f"MACs not known, not in the sum: {shown}{more}")
    return lines


def _shares(counts, total):
    parts = [f"{name} {_count(n)} ({n / total:.1%})" for name, n in counts.items() if n]
    return f": {', '.join(parts)}" if parts else ""


def _count(number):
    return _scaled(number, 1000, ("", "k", "M", "G", "T", "P"))


def format_bytes(number):
    """Bytes for people: 1.20 KiB."""
    return _scaled(number, 1024, (" B", " KiB", " MiB", " GiB", " TiB"))


def format_seconds(seconds):
    """Seconds for people: 12.3 us, 1.20 ms."""
    for factor, unit in ((1.0, "s"), (1e-3, "ms")):
        if seconds >= factor:
            return f"{seconds / factor:.3g} {unit}"
    return f"{seconds / 1e-6:.3g} us"


def _scaled(number, base, units):
    if number < base:
        return f"{number}{units[0]}"
    for unit in units[1:]:
        number /= base
        if number < base or unit == units[-1]:
            break
    return f"{number:.2f}{unit}"
