"""What the blocks of transformers share: arguments handed down, and packing as a whole."""

from typing import Any, ClassVar

import keras

from keras_bitnet.checks import check_choice, check_own_names
from keras_bitnet.layers.base import NORMS, make_norm
from keras_bitnet.layers.changing_precision import ChangingPrecision
from keras_bitnet.layers.inputs import UNTREATED
from keras_bitnet.layers.shared_arguments import SharedArguments, under_own_names


class PacksAsWhole(keras.Layer):
    """Mixin of a layer whose arguments say whether the quantized layers inside are packed.

    `keras_bitnet.pack_model` makes it again with `packed=True` in place of replacing what is
    in it, so it stays of its class, and built so it never allocates a float kernel.
    """

    packed: bool = False
    weight_quantizer: Any

    def remade(self, **changes):
        """A copy made from the config with some arguments changed, weights not copied."""
        return type(self).from_config({**self.get_config(), **changes})


class BitBlock(SharedArguments, PacksAsWhole):
    """Base of the blocks made of quantized layers: takes their arguments and hands them on.

    Args:
        projection_norm: `None`, `"rms"` or `"layer"`: a norm of the inputs of each quantized
            layer inside.
        norm_epsilon: Added to the variance in every norm inside.
        weight_quantizer, activation_quantizer, quantization_strength, packed, packed_layout,
            initializers, regularizers, constraints: Of every quantized layer inside, see
            `keras_bitnet.layers.BitLayer`.

    Raises:
        ValueError: An argument is none of these.
    """

    own_names: ClassVar[dict[str, str | None]] = {
        "norm": "projection_norm",
        "norm_position": None,
        **UNTREATED,
    }

    def __init__(self, *, projection_norm=None, **kwargs):
        super().__init__(**kwargs)
        check_own_names(self, projection_norm=projection_norm)
        check_choice("projection_norm", projection_norm, (None, *NORMS))
        self.projection_norm = projection_norm

    def compute_output_spec(self, *args, **kwargs):
        """The tensor of `compute_output_shape`; scores and caches are found by a symbolic run."""
        if kwargs.get("return_attention_scores") or kwargs.get("cache") is not None:
            return keras.Operation.compute_output_spec(self, *args, **kwargs)
        return super().compute_output_spec(*args, **kwargs)

    def layers_of_one_precision(self):
        """All quantized layers and blocks inside."""
        layers = self._flatten_layers(include_self=False)
        return [layer for layer in layers if isinstance(layer, ChangingPrecision)]

    def save_own_variables(self, store):
        """Writes the variables, and the quantizer where it was changed."""
        super().save_own_variables(store)
        self.save_precision(store)

    def load_own_variables(self, store):
        """Reads what `save_own_variables` wrote."""
        found = {name: store[name] for name in store.keys()}  # noqa: SIM118 (no mapping)
        self.load_precision(found)
        super().load_own_variables(found)

    def block_arguments(self):
        """Arguments of a block inside this one."""
        return {
            "weight_quantizer": self.weight_quantizer,
            "activation_quantizer": self.activation_quantizer,
            "projection_norm": self.projection_norm,
            "norm_epsilon": self.norm_epsilon,
            "quantization_strength": self._initial_strength,
            "packed": self.packed,
            "packed_layout": self.packed_layout,
            "kernel_initializer": _clone(self.kernel_initializer),
            "bias_initializer": _clone(self.bias_initializer),
            "kernel_regularizer": self.kernel_regularizer,
            "bias_regularizer": self.bias_regularizer,
            "kernel_constraint": self.kernel_constraint,
            "bias_constraint": self.bias_constraint,
            "dtype": self.dtype_policy,
        }

    def layer_arguments(self, norm=None):
        """Arguments of a `BitLayer` inside; `norm` takes the place of `projection_norm`."""
        arguments = self.block_arguments()
        projection_norm = arguments.pop("projection_norm")
        return {**arguments, "norm": norm or projection_norm}

    def make_norm(self, kind, name):
        """A norm layer `"rms"` or `"layer"`."""
        return make_norm(kind, epsilon=self.norm_epsilon, dtype=self.dtype_policy, name=name)

    def get_config(self):
        """The arguments of the constructor."""
        norm = {"projection_norm": self.projection_norm}
        return {**super().get_config(), **under_own_names(self, norm)}


def _clone(initializer) -> Any:
    """A copy: one instance would give every kernel of one shape the same values."""
    if isinstance(initializer, keras.initializers.Initializer):
        return type(initializer).from_config(initializer.get_config())
    return initializer
