"""Between layers that train and layers that are small: packing and unpacking."""

import dataclasses
import functools
import warnings

from keras import ops

from keras_bitnet.checks import check_choice
from keras_bitnet.kernels import use_huge_pages
from keras_bitnet.layers.base import BitLayer
from keras_bitnet.layers.block import PacksAsWhole
from keras_bitnet.layers.kernel_weights import MEMORY, assign_copy, layout_for
from keras_bitnet.transforms.converted import Converted, child_layers, get_child
from keras_bitnet.transforms.rewrite import Rule, copy_own_weights, copy_weights, rewrite, some_of


def pack_model(model, *, memory="fastest", verbose=1, return_changes=False):
    """Returns a copy of a model whose quantized layers hold packed codes: small and fast.

    A packed kernel takes 1, 2, 4 or 8 bits a weight in memory (ternary 2; 1.6 on disk) and is
    not trainable. Biases, norms and other layers are kept. The outputs are those of the model
    at `quantization_strength=1`: equal to 1e-5 relative in float32; in lower precision the
    packed sums are exact where quantization-aware training rounds.

    Args:
        model: A built Keras model or layer; it is left as it is.
        memory: `"fastest"`: the layout that kernels read best. `"smallest"`: ternary kernels
            without groups take 1.6 bits a weight in memory too, five to a byte.
        verbose: 1 shows progress and what was kept, 0 nothing.
        return_changes: Whether to return `(model, changes)`, with one `Change` per layer.

    Returns:
        The new model, which `model.save` and `keras.models.load_model` keep packed (in a new
        process `import keras_bitnet` first); or `(model, changes)`.

    Raises:
        ValueError: `model` is not built, a kernel holds a NaN or an infinity, a layer around a
            quantized one reads its float kernel, or `memory` is neither of these.

    Warns:
        UserWarning: A layer below 4 bits was converted from float and not trained since;
            or its `quantization_strength` is not 1.
    """
    check_choice("memory", memory, MEMORY)

    def replace(layer, path):
        if not (isinstance(layer, BitLayer) or _is_uniform(layer)):
            return f"{type(layer).__name__} is not quantized"
        if layer.packed:
            return "packed already"
        layout = layout_for(memory, layer.weight_quantizer)
        return _remade(layer, packed=True, packed_layout=layout)

    def transfer(old, new):
        layers.append(old)
        new.pack_from(old)

    layers: list[BitLayer] = []
    rule = Rule("packed", replace, transfer)
    hint = "all are packed already, or none is quantized, see `quantize_model`"
    packed = _run(model, rule, hint, verbose, return_changes)
    _warn_of_rounding(layers)
    use_huge_pages(packed[0] if return_changes else packed)
    return packed


def unpack_model(model, *, verbose=1, return_changes=False):
    """Returns a copy of a packed model whose kernels are float again, to train it further.

    The float kernel is one that the layer's quantizer takes to the packed codes and scales, so the
    outputs stay the same to 1e-5 relative in float32. What the kernel was before packing is not
    known. Where the scale is a mean or a median it is not the plain values either (see
    `WeightQuantizer.restore`): another quantizer makes other weights of it.

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
        quantized = isinstance(layer, BitLayer) or _is_uniform(layer)
        if not (quantized and layer.packed):
            return f"{type(layer).__name__} is not packed"
        # The outputs to keep are the fully quantized ones, whatever strength training began at.
        changed = {"packed": False, "packed_layout": "tiles", "quantization_strength": 1.0}
        return _remade(layer, **changed)

    def transfer(old, new):
        new.unpack_from(old)

    rule = Rule("unpacked", replace, transfer)
    return _run(model, rule, "the model has no packed layers", verbose, return_changes)


def _run(model, rule, hint, verbose, return_changes):
    transfer = functools.partial(_transfer, rule.transfer)
    new_model, changes = rewrite(model, dataclasses.replace(rule, transfer=transfer), verbose)
    if not any(change.replaced_by for change in changes):
        warnings.warn(f"No layer was {rule.verb}: {hint}.", stacklevel=3)
    return (new_model, changes) if return_changes else new_model


def _remade(layer, **changes):
    if isinstance(layer, PacksAsWhole):
        return layer.remade(**changes)
    return type(layer).from_config({**layer.get_config(), **changes})


def _is_uniform(layer):
    """Whether a block says with its own arguments what all quantized layers in it are."""
    if not isinstance(layer, PacksAsWhole) or isinstance(layer, Converted):
        return False
    inner = [child for child in layer._flatten_layers() if child is not layer]
    return not any(
        isinstance(child, Converted) or getattr(child, "lora_enabled", False) for child in inner
    )


def _transfer(transfer_layer, old, new):
    """Fills a replaced layer: a quantized one with `transfer_layer`, a block from inside."""
    if isinstance(old, BitLayer):
        transfer_layer(old, new)
        copy_the_rest(old, new)
        return
    copy_own_weights(old, new)
    for path, child in child_layers(old).items():
        _transfer(transfer_layer, child, get_child(new, path))


def copy_the_rest(old, new):
    """Copies bias, LoRA and norm: everything that both layers have."""
    news = new.own_weights()
    for name, variable in old.own_weights().items():
        if name in news and not name.startswith("kernel"):
            assign_copy(news[name], variable)
    for path, child in child_layers(old).items():
        copy_weights(child, get_child(new, path))


def _warn_of_rounding(layers):
    rounded = [
        layer.name
        for layer in layers
        if layer.weight_quantizer.bits_per_weight < 4 and layer.untrained
    ]
    if rounded:
        warnings.warn(
            "Packed below 4 bits, and not trained since they were converted from float: "
            f"{some_of(rounded)}. Rounding alone destroys a model: train it with `fit` first.",
            stacklevel=3,
        )
    blended = []
    for layer in layers:
        strength = float(ops.convert_to_numpy(layer.quantization_strength))  # it may be mirrored
        if strength != 1:
            blended.append(f"{layer.name} (quantization_strength={strength:.3g})")
    if blended:
        warnings.warn(
            f"Packed, these layers compute fully quantized: {some_of(blended)}.", stacklevel=3
        )
