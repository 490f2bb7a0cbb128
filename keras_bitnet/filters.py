"""Choosing layers by regular expression or function, as `keras.Model.quantize` does."""

import re


def layer_filter(filters):
    """Returns a function `matches(layer, path) -> bool`.

    Args:
        filters: A regular expression or a list of them, searched in the path of the layer
            (such as `"encoder/attention/query"`), a callable `filters(layer) -> bool`, or
            `None`: every layer.

    Raises:
        ValueError: `filters` is none of these, or no valid regular expression.
    """
    if filters is None:
        return lambda layer, path: True
    if callable(filters):
        return lambda layer, path: bool(filters(layer))
    patterns = [filters] if isinstance(filters, str) else filters
    if not isinstance(patterns, (list, tuple)) or not all(isinstance(p, str) for p in patterns):
        raise ValueError(
            "`filters` must be a regular expression, a list of them, a function of the layer or "
            f"None. Received: {filters!r} of type {type(filters).__name__}"
        )
    try:
        compiled = [re.compile(pattern) for pattern in patterns]
    except re.error as error:
        raise ValueError(
            f"`filters` holds no valid regular expression: {error}. Received: {filters!r}"
        ) from error
    return lambda layer, path: any(pattern.search(path) for pattern in compiled)
