"""How a result is printed: as JSON, or as text with a table for each list of dictionaries."""

from keras_bitnet import valid_json


def to_json(result):
    """The result as JSON; what JSON cannot hold, infinities and NaN, becomes `null`."""
    return valid_json.dumps(result, indent=1)


def show(result):
    """Prints single values as `name: value`, lists of dictionaries as tables below them."""
    from keras_bitnet.report.table import print_table

    tables = {key: value for key, value in result.items() if _is_table(value)}
    single = {key: value for key, value in result.items() if key not in tables}
    for name, rows in tables.items():
        headers = [_words(key) for key in rows[0]]
        numbers = [isinstance(value, (int, float)) for value in rows[0].values()]
        left = next((i for i, number in enumerate(numbers) if number), len(numbers))
        cells = [[_cell(key, value) for key, value in row.items()] for row in rows]
        print_table(headers, cells, title=_words(name), left=left)
    for key, value in single.items():
        print(f"{_words(key)}: {_cell(key, value)}")


def _is_table(value):
    return isinstance(value, list) and bool(value) and isinstance(value[0], dict)


def _words(key):
    words = str(key).replace("_", " ")
    return words[:1].upper() + words[1:]


def _cell(key, value):
    from keras_bitnet.report.table import format_bytes

    if value is None:
        return "-"
    if isinstance(value, (list, tuple)):
        return ", ".join(_cell(key, item) for item in value) or "-"
    if isinstance(value, dict):
        return ", ".join(f"{name} {_cell(name, item)}" for name, item in value.items()) or "-"
    if str(key).startswith("bytes") and isinstance(value, int):
        return format_bytes(value)
    return f"{value:.4g}" if isinstance(value, float) else str(value)
