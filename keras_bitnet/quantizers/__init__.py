"""Quantizers: stateless, serializable objects between float weights and small integers."""

import functools
from collections.abc import Callable

import keras

from keras_bitnet.quantizers.activations import (
    ActivationInt4,
    ActivationInt8,
    ActivationQuantizer,
    StaticActivation,
)
from keras_bitnet.quantizers.base import QuantizedWeight, WeightQuantizer
from keras_bitnet.quantizers.weights import Binary, Int2, Int4, Int8, Ternary

__all__ = [
    "ActivationInt4",
    "ActivationInt8",
    "ActivationQuantizer",
    "Binary",
    "Int2",
    "Int4",
    "Int8",
    "QuantizedWeight",
    "StaticActivation",
    "Ternary",
    "WeightQuantizer",
    "deserialize",
    "get",
    "get_activation",
    "serialize",
]

_WEIGHT = {cls.name: cls for cls in (Binary, Ternary, Int2, Int4, Int8)}
_ACTIVATION: dict[str, Callable] = {
    "int8": ActivationInt8,
    "int4": ActivationInt4,
    # By name there is no calibration to rely on: the scale follows the data in training.
    "static_int8": functools.partial(StaticActivation, 8, momentum=0.99),
    "static_int4": functools.partial(StaticActivation, 4, momentum=0.99),
}


def get(identifier):
    """Returns a weight quantizer.

    Args:
        identifier: `"binary"`, `"ternary"`, `"int2"`, `"int4"`, `"int8"`, a config from
            `serialize`, a `WeightQuantizer`, or `None`, which is returned as it is.

    Returns:
        A `WeightQuantizer` or `None`.

    Raises:
        ValueError: The name is unknown or the object is no weight quantizer.
    """
    return _get(identifier, _WEIGHT, WeightQuantizer, "weight")


def get_activation(identifier):
    """Returns an activation quantizer.

    Args:
        identifier: `"int8"`, `"int4"`, `"static_int8"`, `"static_int4"`, a config from
            `serialize`, an `ActivationQuantizer`, or `None` (activations stay float).

    Returns:
        An `ActivationQuantizer` or `None`.

    Raises:
        ValueError: The name is unknown or the object is no activation quantizer.
    """
    return _get(identifier, _ACTIVATION, ActivationQuantizer, "activation")


def serialize(quantizer):
    """Returns the config of a quantizer, a dictionary that JSON can hold, or `None`."""
    return None if quantizer is None else keras.saving.serialize_keras_object(quantizer)


def deserialize(config, custom_objects=None):
    """Returns the quantizer that `serialize` described.

    Args:
        config: What `serialize` gave, or `None`.
        custom_objects: Dictionary of classes by name that are not registered.

    Returns:
        The quantizer, or `None`.
    """
    return keras.saving.deserialize_keras_object(config, custom_objects=custom_objects)


def _get(identifier, names, base, kind):
    if isinstance(identifier, dict):
        identifier = deserialize(identifier)
    if isinstance(identifier, str):
        if identifier not in names:
            raise ValueError(
                f"Unknown {kind} quantizer. Accepted names: {sorted(names)}, or an instance of "
                f"`{base.__name__}`. Received: {identifier!r}"
            )
        return names[identifier]()
    if identifier is None or isinstance(identifier, base):
        return identifier
    raise ValueError(
        f"A {kind} quantizer is one of {sorted(names)}, a `{base.__name__}`, its config or None. "
        f"Received: {identifier!r} of type {type(identifier).__name__}"
    )
