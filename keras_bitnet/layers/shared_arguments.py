"""The arguments that quantized layers and blocks of them have in common."""

from typing import ClassVar

from keras import constraints, initializers, regularizers

from keras_bitnet import quantizers
from keras_bitnet.checks import check_choice, check_number
from keras_bitnet.layers.changing_precision import ChangingPrecision
from keras_bitnet.layers.kernel_weights import MEMORY, layout_for


class SharedArguments(ChangingPrecision):
    """Mixin of `BitLayer` and `BitBlock`: takes, checks and serializes what both are made with.

    They are explained at `BitLayer`.
    """

    # Arguments of `BitLayer` that a subclass has under another name, or not at all (`None`).
    own_names: ClassVar[dict[str, str | None]] = {}
    # Arguments that `quantize_model` leaves at their default in this layer.
    not_in_spec: ClassVar[frozenset[str]] = frozenset()

    def __init__(
        self,
        *,
        weight_quantizer="ternary",
        activation_quantizer="int8",
        norm_epsilon=1e-5,
        quantization_strength=1.0,
        packed=False,
        packed_layout="tiles",
        kernel_initializer="glorot_uniform",
        bias_initializer="zeros",
        kernel_regularizer=None,
        bias_regularizer=None,
        kernel_constraint=None,
        bias_constraint=None,
        **kwargs,
    ):
        if kwargs.pop("quantization_config", None) is not None:
            raise ValueError(
                f"{type(self).__name__} takes `weight_quantizer` and `activation_quantizer` in "
                "place of Keras's `quantization_config`."
            )
        super().__init__(**kwargs)
        if self.quantization_mode is not None:
            raise ValueError(
                f"{type(self).__name__} quantizes by itself: its dtype policy must be a plain one "
                f"such as 'float32' or 'mixed_bfloat16'. Received: dtype={self.dtype_policy.name}"
            )
        check_number("norm_epsilon", norm_epsilon, "[0, inf)")
        check_number("quantization_strength", quantization_strength, "[0, 1]")
        self.weight_quantizer = quantizers.get(weight_quantizer)
        if self.weight_quantizer is None:
            raise ValueError("`weight_quantizer` is required; for a float layer use Keras's own.")
        layouts = (layout_for(memory, self.weight_quantizer) for memory in MEMORY)
        check_choice("packed_layout", packed_layout, tuple(dict.fromkeys(layouts)))
        self.activation_quantizer = quantizers.get_activation(activation_quantizer)
        self.norm_epsilon = float(norm_epsilon)
        self._initial_strength = float(quantization_strength)
        self.packed = bool(packed)
        self.packed_layout = packed_layout
        self.kernel_initializer = initializers.get(kernel_initializer)
        self.bias_initializer = initializers.get(bias_initializer)
        self.kernel_regularizer = regularizers.get(kernel_regularizer)
        self.bias_regularizer = regularizers.get(bias_regularizer)
        self.kernel_constraint = constraints.get(kernel_constraint)
        self.bias_constraint = constraints.get(bias_constraint)

    def get_config(self):
        """The arguments of the constructor."""
        config = {
            "weight_quantizer": quantizers.serialize(self.weight_quantizer),
            "activation_quantizer": quantizers.serialize(self.activation_quantizer),
            "norm_epsilon": self.norm_epsilon,
            "quantization_strength": self._initial_strength,
            "packed": self.packed,
            "packed_layout": self.packed_layout,
            "kernel_initializer": initializers.serialize(self.kernel_initializer),
            "bias_initializer": initializers.serialize(self.bias_initializer),
            "kernel_regularizer": regularizers.serialize(self.kernel_regularizer),
            "bias_regularizer": regularizers.serialize(self.bias_regularizer),
            "kernel_constraint": constraints.serialize(self.kernel_constraint),
            "bias_constraint": constraints.serialize(self.bias_constraint),
        }
        return {**super().get_config(), **under_own_names(self, config)}


def under_own_names(layer, config):
    """Arguments of `BitLayer` under the names that a layer or class has for them."""
    own = {layer.own_names.get(name, name): value for name, value in config.items()}
    return {name: value for name, value in own.items() if name is not None}
