"""Between layers that train and layers that are small: packing and unpacking."""

import warnings

from keras_bitnet.layers.base import BitLayer, assign_copy
from keras_bitnet.transforms.converted import child_layers, get_child
from keras_bitnet.transforms.rewrite import Rule, copy_weights, rewrite


def pack_model(model, *, verbose=1, return_changes=False):
    """Returns a copy of a model whose quantized layers hold packed codes: small and fast.

    A packed kernel takes 1, 2, 4 or 8 bits a weight in memory (ternary 2; 1.6 on disk) and is
    not trainable. Biases, norms and other layers are kept. The outputs are those of the model
    at `quantization_strength=1`: equal to 1e-5 relative in float32; in lower precision the
    packed sums are exact where quantization-aware training rounds.

    Args:
        model: A built Keras model or layer; it is left as it is.
        verbose: 1 shows progress and what was kept, 0 nothing.
        return_changes: Whether to return `(model, changes)`, with one `Change` per layer.

    Returns:
        The new model, which `model.save` and `keras.models.load_model` keep packed (in a new
        process `import keras_bitnet` first); or `(model, changes)`.

    Raises:
        ValueError: `model` is not built, or a kernel holds a NaN or an infinity.

    Warns:
        UserWarning: A layer below 4 bits was converted from float and not trained since;
            or its `quantization_strength` is not 1.
    """

    def replace(layer, path):
        if not isinstance(layer, BitLayer):
            return f"{type(layer).__name__} is not quantized"
        if layer.packed:
            return "packed already"
        return type(layer).from_config({**layer.get_config(), "packed": True})

    def transfer(old, new):
        _warn_before_packing(old)
        new.pack_from(old)
        copy_the_rest(old, new)

    return _run(model, Rule("packed", replace, transfer), verbose, return_changes)


def unpack_model(model, *, verbose=1, return_changes=False):
    """Returns a copy of a packed model whose kernels are float again, to train it further.

    The float kernel is one that quantizes to the packed codes and scales, so the outputs stay
    the same to 1e-5 relative in float32. What the kernel was before packing is not known.

    Args:
        model: A built Keras model or layer; it is left as it is.
        verbose: 1 shows progress and what was kept, 0 nothing.
        return_changes: Whether to return `(model, changes)`, with one `Change` per layer.

    Returns:
        The new model, or `(model, changes)`.

    Raises:
        ValueError: `model` is not built.
    """

    def replace(layer, path):
        if not (isinstance(layer, BitLayer) and layer.packed):
            return f"{type(layer).__name__} is not packed"
        # The outputs to keep are the fully quantized ones, whatever strength training began at.
        changed = {"packed": False, "quantization_strength": 1.0}
        return type(layer).from_config({**layer.get_config(), **changed})

    def transfer(old, new):
        new.unpack_from(old)
        copy_the_rest(old, new)

    return _run(model, Rule("unpacked", replace, transfer), verbose, return_changes)


def _run(model, rule, verbose, return_changes):
    new_model, changes = rewrite(model, rule, verbose)
    if not any(change.replaced_by for change in changes):
        warnings.warn(f"No layer was {rule.verb}: the model has none to be.", stacklevel=3)
    return (new_model, changes) if return_changes else new_model


def copy_the_rest(old, new):
    """Copies bias, LoRA and norm: everything that both layers have."""
    news = new.own_weights()
    for name, variable in old.own_weights().items():
        if name in news and not name.startswith("kernel"):
            assign_copy(news[name], variable)
    for path, child in child_layers(old).items():
        copy_weights(child, get_child(new, path))


def _warn_before_packing(layer):
    bits = layer.weight_quantizer.bits_per_weight
    if layer.untrained and bits < 4:
        warnings.warn(
            f"Layer '{layer.name}' is packed to {bits:.3g} bits and was not trained since it was "
            "converted from float. Rounding alone destroys a model below 4 bits: train it with "
            "`fit` first.",
            stacklevel=6,
        )
    if float(layer.quantization_strength) != 1:
        warnings.warn(
            f"Layer '{layer.name}' has quantization_strength="
            f"{float(layer.quantization_strength):.3g}. Packed, it computes fully quantized.",
            stacklevel=6,
        )
