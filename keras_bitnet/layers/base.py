"""What the quantized layers share: a kernel that is float, quantization-aware or packed.

A layer is a matrix product between two reshapes: `call` brings its input to rows
`(..., in_features)`, `BitLayer.product` multiplies, `call` shapes the rows `(..., out_features)`
back. A layer that is such a product knows nothing of "packed": this and its mixins do. Embeddings
and depthwise convolutions, which are none, ask for it themselves.
"""

from typing import Any

import keras
from keras import activations, ops

from keras_bitnet.checks import check_choice, check_count, check_own_names
from keras_bitnet.layers.inputs import InputTreatment
from keras_bitnet.layers.joint import joint_product
from keras_bitnet.layers.kernel_weights import KernelWeights
from keras_bitnet.layers.lora import LowRankAdaptation
from keras_bitnet.layers.rms_normalization import RMSNormalization
from keras_bitnet.layers.shared_arguments import SharedArguments, under_own_names
from keras_bitnet.layers.short_call import ShortCall
from keras_bitnet.ops.bit_matmul import bit_matmul

NORMS = {"rms": RMSNormalization, "layer": keras.layers.LayerNormalization}


class BitLayer(ShortCall, SharedArguments, InputTreatment, LowRankAdaptation, KernelWeights):
    """Base of the quantized layers. Arguments are those that every one of them takes.

    Args:
        weight_quantizer: `"binary"`, `"ternary"`, `"int2"`, `"int4"`, `"int8"` or a
            `keras_bitnet.quantizers.WeightQuantizer`.
        activation_quantizer: `"int8"`, `"int4"`, `"static_int8"`, `"static_int4"`, an
            `ActivationQuantizer`, or `None`: the inputs stay float.
        norm: `None`, `"rms"` or `"layer"`: a trained normalization in the layer.
        norm_position: `"pre"`: of the inputs, before they are quantized. `"post"`: of
            kernel product plus bias, before the activation function.
        norm_epsilon: Added to the variance.
        quantization_strength: Initial value in [0, 1] of the variable of this name: 0 is the
            float layer, 1 the quantized one, between them a blend. It can change during `fit`.
        packed: Whether the kernel is stored as packed codes, not trainable. Made by
            `keras_bitnet.pack_model`; no reason to set it by hand.
        packed_layout: `"tiles"`, or for ternary weights without groups `"trits"`: how the packed
            codes lie in memory, see `keras_bitnet.ops.layout`.
        smoothing, rotation, kept_channels, kept_bits: What is done about outliers of the inputs,
            see `InputTreatment` and `KeptChannels`. They act fully once `calibrate` has seen data.
        lora_rank: Rank of a trained low-rank addition to the kernel, or `None`. The kernel
            itself is then frozen. See `enable_lora`.
        lora_alpha: The addition is scaled by `lora_alpha / lora_rank`; `lora_rank` by default.
        activation: Activation function, none by default.
        kernel_initializer, kernel_regularizer, kernel_constraint: As in Keras, on the float
            kernel.
        bias_initializer, bias_regularizer, bias_constraint: As in Keras.

    Raises:
        ValueError: An argument is none of these.
    """

    def __init__(
        self,
        *,
        norm=None,
        norm_position="pre",
        lora_rank=None,
        lora_alpha=None,
        activation=None,
        **kwargs,
    ):
        super().__init__(**kwargs)
        check_own_names(self, norm=norm, activation=activation, lora_rank=lora_rank)
        check_choice("norm", norm, (None, *NORMS))
        check_choice("norm_position", norm_position, ("pre", "post"))
        if lora_rank is not None:
            check_count("lora_rank", lora_rank)
        self.norm = norm
        self.norm_position = norm_position
        self.lora_rank = lora_rank
        self.lora_alpha = lora_alpha if lora_alpha is not None else lora_rank
        self.activation = activations.get(activation)
        self.normalization: Any = None
        if norm is not None:
            self.normalization = make_norm(
                norm, epsilon=self.norm_epsilon, dtype=self.dtype_policy, name="normalization"
            )

    def product(self, x, window=None):
        """Multiplies rows by the kernel: normalized, quantized or packed, with bias and LoRA.

        Args:
            x: Tensor `(..., in_features)`.
            window: Of a packed layer without LoRA that only quantizes its rows, maybe after an RMS
                norm: the `keras_bitnet.ops.window.Window` that sees them in images `x`.

        Returns:
            Tensor `(..., out_features)`.
        """
        norm = self._norm_of_product()
        if norm is None:
            x = self.normalize_inputs(x)
        y = self._quantized_product(self.smooth(x), norm, window)
        if self.lora_enabled:
            low_rank = ops.matmul(ops.matmul(x, self.lora_kernel_a), self.lora_kernel_b)
            y = y + ops.cast(low_rank * (self.lora_alpha / self.lora_rank), y.dtype)
        y = self.shape_outputs(y)
        if self.normalization is not None and self.norm_position == "post":
            y = self.normalization.call(y)
        return y

    def row_bias(self):
        """The bias `(out_features,)` of a product, or `None`."""
        return self.bias

    def multiplies_alone(self, x):
        """Whether a call with `x` quantizes it, multiplies it by a packed kernel, and does nothing
        before: `keras_bitnet.layers.joint` may then do both beside other layers.
        """
        if not (self.built and self.packed) or self._norm_first or not self.quantized_alone:
            return False
        rows = x.shape[-1] == self.in_features
        rows = rows and keras.backend.standardize_dtype(x.dtype) == self.compute_dtype
        return rows and not self.static and self._look is None

    @property
    def is_one_product(self):
        """Whether a call is a packed product and its bias, after an RMS norm at most."""
        plain = self.built and self.packed and self._untreated and self._look is None
        plain = plain and not self.static and not self.lora_enabled
        plain = plain and self.activation in (None, activations.linear)
        return plain and (self.normalization is None or self.norm_alone)

    def shape_outputs(self, y):
        """What a subclass does to a product before the norm after it; nothing here."""
        return y

    def _norm_of_product(self):
        """`(gain, epsilon)` of a norm that the packed product can do, or `None`."""
        alone = self.packed and self.norm_alone and not self.lora_enabled and self._look is None
        return (self.normalization.scale, self.norm_epsilon) if alone else None

    def _quantized_product(self, x, norm, window):
        together = joint_product(self, x)
        if together is not None:
            return together
        quantizer, bias = self.activation_quantizer, self.row_bias()
        if self._look is not None:  # calibration: it sees the inputs, and they stay float
            self._look(self, x)
            quantizer = None
        x, kept = self.split_channels(self.rotate(x))
        if self.packed:
            scale = None if quantizer is None else self.scale_for(x)
            y = bit_matmul(x, self.packed_kernel, quantizer, bias, scale, norm, window)
            return y if kept is None else y + self.kept_product(kept)
        strength = ops.convert_to_tensor(self.quantization_strength)
        if quantizer is not None:
            x = self.fake_quantize_inputs(x, strength)
        y = ops.matmul(x, self.fake_quantized_matrix(strength, x.dtype))
        if kept is not None:
            y = y + self.kept_product(kept, strength)
        return y if bias is None else ops.add(y, bias)

    def compute_mask(self, inputs, previous_mask):
        """The mask of the inputs, unchanged."""
        return previous_mask

    def get_config(self):
        """The arguments of the constructor."""
        config = {
            "norm": self.norm,
            "norm_position": self.norm_position,
            "activation": activations.serialize(self.activation),
        }
        if self.lora_rank:
            config["lora_rank"] = self.lora_rank
            config["lora_alpha"] = self.lora_alpha
        return {**super().get_config(), **under_own_names(self, config)}


def make_norm(kind, **arguments):
    """A norm layer of a kind of `NORMS` that lets masks pass."""
    norm = NORMS[kind](**arguments)
    norm.supports_masking = True
    return norm
