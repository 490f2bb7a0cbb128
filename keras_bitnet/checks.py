"""Checks of arguments that several rooms make, with one wording."""

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
            raise ValueError(
                f"{type(layer).__name__} has no `{name}`; put a layer for it behind this one. "
                f"Received: {name}={value!r}"
            )


def check_count(name, value, least=1):
    """Raises a `ValueError` unless `value` is an integer of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(
            f"`{name}` must be an integer of at least {least}. Received: {name}={value!r}"
        )
