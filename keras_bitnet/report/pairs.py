"""Which layers of a float and a quantized model belong together, and their kernels in one basis."""

import numpy as np
from keras import ops

from keras_bitnet.layers.base import BitLayer
from keras_bitnet.transforms.pack import copy_the_rest
from keras_bitnet.transforms.quantize import TWINS
from keras_bitnet.transforms.rewrite import Rule, named_layers, rewrite

# Twins of one Keras layer that hold several quantized layers.
BLOCKS = tuple(twin for twin in TWINS.values() if not issubclass(twin, BitLayer))
_FLOAT = {"packed": False, "packed_layout": "tiles", "lora_rank": None}


def quantized_units(model):
    """The quantized layers of a model by path; a twin of one Keras layer is one of them."""
    return dict(outermost_units(model, BLOCKS))


def outermost_units(model, blocks):
    """Yields `(path, layer)` of the blocks of these classes, and of `BitLayer`s in none of them."""
    inside = ""
    for path, layer in named_layers(model):
        if inside and path.startswith(inside):
            continue
        is_block = isinstance(layer, blocks)
        if is_block or isinstance(layer, BitLayer):
            yield path, layer
        if is_block:
            inside = f"{path}/"


def inner_layers(layer):
    """The `BitLayer`s that a quantized layer consists of: itself, or those inside."""
    if isinstance(layer, BitLayer):
        return [layer]
    return [inner for _, inner in named_layers(layer) if isinstance(inner, BitLayer)]


def unit_pairs(reference, quantized):
    """The quantized layers with their float twins: `{path: (float layer, quantized layer)}`.

    Raises:
        ValueError: There is no quantized layer, or none with a twin at its path.
    """
    twins = dict(named_layers(reference))
    found = quantized_units(quantized)
    pairs = {path: (twins[path], layer) for path, layer in found.items() if path in twins}
    if not pairs:
        raise ValueError(
            "The models share no quantized layer. Expected a model of `quantize_model` or "
            "`pack_model` and the float model that it was made from, with the same names. "
            f"Received: quantized layers {sorted(found)}, layers of the reference {sorted(twins)}"
        )
    return pairs


def kernels(old, new):
    """Float and quantized kernels of a pair, as the treated inputs of the quantized layer need.

    Args:
        old: The float layer: a Keras layer, or a quantized one whose kernel is float.
        new: The quantized layer, packed or not.

    Returns:
        List of `(expected, actual)`, arrays `(in_features, out_features)`, one for each
        `BitLayer` in it.

    Raises:
        ValueError: The layers do not belong together.
    """
    inner = inner_layers(new)
    try:
        expected = _float_matrices(old, new, inner)
    except (AttributeError, TypeError, ValueError) as error:
        raise ValueError(
            f"Layer '{new.name}' ({type(new).__name__}) of the model is no twin of the layer of "
            f"that name in the reference ({type(old).__name__}): {error}"
        ) from error
    return list(zip(expected, map(_quantized_matrix, inner), strict=True))


def quantized_rows(layer, matrix):
    """The rows of a kernel `(in_features, out_features)` that are not kept apart."""
    if not layer.kept_channels:
        return matrix
    return np.delete(matrix, ops.convert_to_numpy(layer.kept_indices), axis=0)


def untreated(layer, matrix):
    """The opposite of `layer.adapt_matrix`: the kernel for inputs that are only normalized."""
    matrix = layer.rotate_rows(ops.convert_to_tensor(matrix))
    if layer.input_gain is not None:
        matrix = matrix * ops.convert_to_tensor(layer.input_gain)[:, None]
    return matrix


def _float_matrices(old, new, inner):
    olds = inner_layers(old)
    if not olds:
        olds = _converted(old, new)
        return [array(layer.kernel_matrix()) for layer in olds]
    matrices = []
    for first, second in zip(olds, inner, strict=True):
        matrix = array(untreated(first, first.kernel_matrix())) * _gain_ratio(first, second)
        matrices.append(array(second.adapt_matrix(ops.convert_to_tensor(matrix))))
    return matrices


def _converted(old, new):
    """The `BitLayer`s of a float twin of `new` that takes the weights of a Keras layer."""

    def float_copy(layer, path):
        if not isinstance(layer, BitLayer):
            return "not quantized"
        config = layer.get_config()
        return type(layer).from_config(
            {**config, **{k: v for k, v in _FLOAT.items() if k in config}}
        )

    twin, _ = rewrite(new, Rule("copied", float_copy, copy_the_rest), verbose=0)
    twin.take_weights(old)
    return inner_layers(twin)


def _gain_ratio(old, new):
    """Smoothing may sit in the norm of one of two layers: what their kernels differ by, `(in, 1)`.

    Where neither is smoothed that way, the norms are trained weights like others.
    """
    smoothed = any(layer.smoothing is not None and layer.input_gain is None for layer in (old, new))
    if not smoothed or old.normalization is None or new.normalization is None:
        return 1.0
    first, second = (array(layer.normalization.weights[0]) for layer in (old, new))
    return np.divide(first, second, out=np.ones_like(first), where=second != 0)[:, None]


def _quantized_matrix(layer):
    if layer.packed:
        return array(layer.packed_kernel.dequantize())
    return array(layer.fake_quantized_matrix())


def array(tensor):
    """A tensor as a `float32` NumPy array."""
    return ops.convert_to_numpy(ops.cast(tensor, "float32"))
