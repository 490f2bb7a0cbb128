"""JSON that every reader takes: Python's own writes infinities and NaN, which are none."""

import json
import math


def dumps(content, **kwargs):
    """Dictionaries and lists as JSON; infinities and NaN become `null`.

    Args:
        content: What `json.dumps` takes.
        **kwargs: Arguments of `json.dumps`.
    """
    return json.dumps(_finite(content), allow_nan=False, **kwargs)


def _finite(value):
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
