"""From a float Keras model to one that trains with quantization."""

import warnings
from typing import Any

import keras

from keras_bitnet import layers as bit_layers
from keras_bitnet import quantizers
from keras_bitnet.filters import layer_filter
from keras_bitnet.layers.base import BitLayer
from keras_bitnet.layers.shared_arguments import under_own_names
from keras_bitnet.transforms.pack import copy_the_rest
from keras_bitnet.transforms.precision_plan import PrecisionPlan, layer_arguments
from keras_bitnet.transforms.rewrite import Rule, rewrite

TWINS: dict[type, Any] = {
    keras.layers.Dense: bit_layers.BitLinear,
    keras.layers.EinsumDense: bit_layers.BitEinsumDense,
    keras.layers.Conv1D: bit_layers.BitConv1D,
    keras.layers.Conv2D: bit_layers.BitConv2D,
    keras.layers.Conv3D: bit_layers.BitConv3D,
    keras.layers.DepthwiseConv1D: bit_layers.BitDepthwiseConv1D,
    keras.layers.DepthwiseConv2D: bit_layers.BitDepthwiseConv2D,
    keras.layers.SeparableConv1D: bit_layers.BitSeparableConv1D,
    keras.layers.SeparableConv2D: bit_layers.BitSeparableConv2D,
    keras.layers.Embedding: bit_layers.BitEmbedding,
    keras.layers.ReversibleEmbedding: bit_layers.ReversibleBitEmbedding,
}
_NOT_KEPT = {"quantization_config", "gptq_unpacked_column_size", "lora_rank", "lora_alpha"}


def quantize_model(
    model, spec="ternary", filters=None, *, requantize=False, verbose=1, return_changes=False
):
    """Returns a copy of a model in which layers are replaced by quantized twins, weights kept.

    Dense, convolutional and embedding layers (the keys of `TWINS`) have one, also inside other
    layers (such as `MultiHeadAttention`), nested and subclassed models. The copy trains with
    `fit`; pack it afterwards with `pack_model`. LoRA weights are merged into the kernels. With
    `quantization_strength=0` in the spec the outputs are those of the float model until the
    strength is raised.

    Args:
        model: A built Keras model or layer; it is left as it is.
        spec: What the layers become: the name of a weight quantizer (`"ternary"`, ...), a
            `WeightQuantizer`, a dictionary of arguments of `keras_bitnet.layers.BitLayer` (those
            that a twin does not have, such as the norm of an embedding, are left out), or a
            callable `spec(layer)` that gives one of these, or `None`: keep the layer. Or a
            `keras_bitnet.PrecisionPlan`, which has one for each path.
        filters: Which layers: a regex or a list of them, searched in the path of the layer
            (such as `"encoder/attention/query"`), or a callable `filters(layer) -> bool`.
            All by default.
        requantize: Whether layers that are quantized already, and not packed, take the arguments
            too: those of a `BitNetCausalLM`, say. Their float kernels and strength are kept (those
            of `unpack_model` suit their own quantizer, see there). Without, they stay as they are.
        verbose: 1 shows progress and what was kept, 0 nothing.
        return_changes: Whether to return `(model, changes)`, with one `Change` per layer.

    Returns:
        The new model, compiled like `model` if that was; or `(model, changes)`. A subclass of a
        Functional model with a constructor of its own, such as a task of KerasHub, becomes a plain
        Functional model: call its preprocessor first.

    Raises:
        ValueError: An argument is not one of these, or `model` is not built.
    """
    matches = layer_filter(filters)

    def replace(layer, path):
        refusal = _refusal(layer, requantize)
        if refusal:
            return refusal
        if not matches(layer, path):
            return "left out by `filters`"
        if layer.quantization_mode is not None:
            return f"quantized by Keras already ({layer.quantization_mode})"
        paths.append(path)
        arguments = _arguments_for(spec, layer, path)
        if arguments is None:
            return "left out by `spec`"
        make = requantized if isinstance(layer, BitLayer) else twin_of
        return make(layer, arguments)

    paths: list[str] = []
    _check_spec(spec)
    new_model, changes = rewrite(model, Rule("quantized", replace, _take_weights), verbose)
    if not any(change.replaced_by for change in changes):
        warnings.warn(
            "`quantize_model` found no layer to quantize. It looks for "
            f"{', '.join(sorted(cls.__name__ for cls in TWINS))} that `filters` lets through, and "
            "with `requantize=True` for layers that are quantized already.",
            stacklevel=2,
        )
    _warn_of_unused_rules(spec, paths)
    return (new_model, changes) if return_changes else new_model


def twin_of(layer, arguments=None):
    """The unbuilt quantized twin of a float layer with arguments of `BitLayer`, or `None`."""
    twin = _twin(type(layer))
    if twin is None:
        return None
    config = {k: v for k, v in layer.get_config().items() if k not in _NOT_KEPT}
    arguments = {k: v for k, v in (arguments or {}).items() if k not in twin.not_in_spec}
    return _made(twin, {**config, **under_own_names(twin, arguments)})


def _refusal(layer, requantize):
    """Why a layer cannot be replaced, or `None`."""
    if not isinstance(layer, BitLayer):
        known = _twin(type(layer)) is not None
        return None if known else f"{type(layer).__name__} has no quantized twin"
    if not requantize:
        return "quantized already"
    if layer.packed:
        return "packed already"
    if layer.smoothing is not None or layer.rotation or layer.kept_channels:
        return "its kernel is made for inputs that are smoothed, rotated or kept apart"
    return None


def requantized(layer, arguments):
    """The unbuilt copy of a quantized layer with other arguments of `BitLayer`."""
    cls = type(layer)
    arguments = {k: v for k, v in arguments.items() if k not in cls.not_in_spec}
    return _made(cls, {**layer.get_config(), **under_own_names(cls, arguments)})


def _made(cls, config):
    """`cls.from_config(config)`, with the constructor's own word where it refuses an argument."""
    try:
        return cls.from_config(config)
    except TypeError as error:  # Keras's, with all of the config in it
        if not isinstance(error.__context__, ValueError):
            raise
        raise ValueError(f"Layer '{config['name']}': {error.__context__}") from error


def _take_weights(old, new):
    if not isinstance(old, BitLayer):
        new.take_weights(old)
        return
    new.take_kernel(old.kernel)
    copy_the_rest(old, new)
    if old.untrained:
        new.mark_untrained()


def _twin(cls):
    """The twin of a class, or of the nearest ancestor that it adds nothing to."""
    for ancestor in cls.__mro__:
        if ancestor in TWINS:
            same = all(getattr(cls, name) is getattr(ancestor, name) for name in _BEHAVIOUR)
            return TWINS[ancestor] if same else None
    return None


_BEHAVIOUR = ("__init__", "build", "call", "get_config")


def _is_function(spec):
    return callable(spec) and not isinstance(spec, quantizers.WeightQuantizer)


def _check_spec(spec):
    if not isinstance(spec, PrecisionPlan) and not _is_function(spec):
        layer_arguments(spec)


def _arguments_for(spec, layer, path):
    if isinstance(spec, PrecisionPlan):
        return spec.spec_for(path)
    return layer_arguments(spec(layer) if _is_function(spec) else spec)


def _warn_of_unused_rules(spec, paths):
    unused = spec.unused_rules(paths) if isinstance(spec, PrecisionPlan) else []
    if unused:
        warnings.warn(
            f"Rules of the plan match no layer: {unused}. The layers are: {paths}", stacklevel=3
        )
