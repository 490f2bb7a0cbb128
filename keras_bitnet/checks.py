"""Checks of arguments that several rooms make, with one wording."""

import numbers

import keras


def check_choice(name, value, accepted):
    """Raises a `ValueError` unless `value` is one of `accepted`."""
    if value not in accepted:
        raise ValueError(f"`{name}` must be one of {accepted}. Received: {name}={value!r}")


def check_built(model):
    """Raises a `ValueError` unless `model` is a Keras model or layer that has its weights."""
    if not isinstance(model, keras.Layer):
        raise ValueError(f"Expected a Keras model or layer. Received: {type(model).__name__}")
    if not model.built:
        raise ValueError(
            f"Model '{model.name}' has no weights yet. Build it (`model.build(input_shape)`) or "
            "call it on data first."
        )


def check_own_names(layer, **arguments):
    """Raises a `ValueError` where an argument is given that the layer does not have."""
    for name, value in arguments.items():
        if value is not None and layer.own_names.get(name, name) is None:
            raise ValueError(f"{type(layer).__name__} has no `{name}`. Received: {name}={value!r}")


def check_count(name, value, least=1):
    """Raises a `ValueError` unless `value` is an integer of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(
            f"`{name}` must be an integer of at least {least}. Received: {name}={value!r}"
        )


def check_number(name, value, interval):
    """Raises a `ValueError` unless `value` is a real number in an interval.

    Args:
        name: Name of the argument.
        value: What was given for it.
        interval: Such as `"[0, 1)"`, with a round bracket at an end that is left out; `inf` is one.
    """
    low, high = map(float, interval[1:-1].split(","))
    is_real = isinstance(value, numbers.Real)  # apart: mypy has no order for `Real`
    inside = is_real and low <= value <= high
    left_out = (interval[0] == "(" and value == low) or (interval[-1] == ")" and value == high)
    if not inside or left_out:
        raise ValueError(f"`{name}` must be a number in {interval}. Received: {name}={value!r}")
