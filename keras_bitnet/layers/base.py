"""What the quantized layers share: a kernel that is float, quantization-aware or packed.

A layer is a matrix product between two reshapes: `call` brings its input to rows
`(..., in_features)`, `BitLayer.product` multiplies, `call` shapes the rows `(..., out_features)`
back. No other layer code knows what "packed" means.
"""

import zlib
from typing import Any, ClassVar

import keras
import numpy as np
from keras import activations, constraints, initializers, ops, regularizers

from keras_bitnet import quantizers
from keras_bitnet.checks import check_choice, check_own_names
from keras_bitnet.layers.inputs import InputTreatment
from keras_bitnet.layers.large_weights import UntouchedZeros
from keras_bitnet.layers.lora import LowRankAdaptation, check_rank
from keras_bitnet.layers.named_weights import NamedWeights
from keras_bitnet.ops import layout
from keras_bitnet.ops.bit_matmul import bit_matmul
from keras_bitnet.ops.packed_tensor import PackedTensor

NORMS = {"rms": keras.layers.RMSNormalization, "layer": keras.layers.LayerNormalization}


class BitLayer(InputTreatment, LowRankAdaptation, NamedWeights):
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
    """

    # Arguments of this class that a subclass has under another name, or not at all (`None`).
    own_names: ClassVar[dict[str, str | None]] = {}
    # Arguments that `quantize_model` leaves at their default in this layer.
    not_in_spec: ClassVar[frozenset[str]] = frozenset()

    def __init__(
        self,
        *,
        weight_quantizer="ternary",
        activation_quantizer="int8",
        norm=None,
        norm_position="pre",
        norm_epsilon=1e-5,
        quantization_strength=1.0,
        packed=False,
        packed_layout="tiles",
        lora_rank=None,
        lora_alpha=None,
        activation=None,
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
        check_own_names(self, norm=norm, activation=activation)
        _check_arguments(type(self).__name__, norm, norm_position, quantization_strength, lora_rank)
        if self.quantization_mode is not None:
            raise ValueError(
                f"{type(self).__name__} quantizes by itself: its dtype policy must be a plain one "
                f"such as 'float32' or 'mixed_bfloat16'. Received: dtype={self.dtype_policy.name}"
            )
        self.weight_quantizer = quantizers.get(weight_quantizer)
        if self.weight_quantizer is None:
            raise ValueError("`weight_quantizer` is required; for a float layer use Keras's own.")
        self.activation_quantizer = quantizers.get_activation(activation_quantizer)
        self.norm = norm
        self.norm_position = norm_position
        self.norm_epsilon = float(norm_epsilon)
        self._initial_strength = float(quantization_strength)
        self.packed = bool(packed)
        self.packed_layout = packed_layout
        _check_layout(packed_layout, self.weight_quantizer)
        self.lora_rank = lora_rank
        self.lora_alpha = lora_alpha if lora_alpha is not None else lora_rank
        self.activation = activations.get(activation)
        self.kernel_initializer = initializers.get(kernel_initializer)
        self.bias_initializer = initializers.get(bias_initializer)
        self.kernel_regularizer = regularizers.get(kernel_regularizer)
        self.bias_regularizer = regularizers.get(bias_regularizer)
        self.kernel_constraint = constraints.get(kernel_constraint)
        self.bias_constraint = constraints.get(bias_constraint)
        self.bias: Any = None
        self.kernel: Any = None
        self.kernel_log2_scale: Any = None
        self.kernel_scale: Any = None
        self.kernel_tiles: Any = None
        self.quantization_strength: Any = None
        self.normalization: Any = None
        self._untrained_checksum: int | None = None
        if norm is not None:
            self.normalization = make_norm(
                norm, epsilon=self.norm_epsilon, dtype=self.dtype_policy, name="normalization"
            )

    # -- weights ---------------------------------------------------------------------------

    def build_kernel(self, in_features, out_features, kernel_shape=None):
        """Creates the weights of the product; a subclass calls it in `build`.

        Args:
            in_features: Rows of the kernel as a matrix.
            out_features: Columns of the kernel as a matrix.
            kernel_shape: Shape of the float kernel, `(in_features, out_features)` by default.
        """
        self.in_features, self.out_features = in_features, out_features
        self.build_inputs()
        self.build_kept()
        if self.packed:
            self._build_packed()
        else:
            self._build_float(kernel_shape or (in_features, out_features))
        if self.normalization is not None:
            size = in_features if self.norm_position == "pre" else out_features
            self.normalization.build((None, size))

    def _build_float(self, kernel_shape):
        # Codes come from the float32 master weight, so kernel and scale are never autocast.
        self.kernel = self.add_weight(
            name="kernel",
            shape=kernel_shape,
            initializer=self._initial_kernel,
            regularizer=self.kernel_regularizer,
            constraint=self.kernel_constraint,
            autocast=False,
        )
        if self.weight_quantizer.learned:
            # Trained as its logarithm: a step of Adam is then relative, and it stays positive.
            self.kernel_log2_scale = self.add_weight(
                name="kernel_log2_scale",
                shape=self.weight_quantizer.scale_shape(self.in_features, self.out_features),
                initializer=self._initial_log2_scale,
                dtype="float32",
                autocast=False,
            )
        self.quantization_strength = self.add_weight(
            name="quantization_strength",
            shape=(),
            initializer=initializers.Constant(self._initial_strength),
            dtype="float32",
            trainable=False,
            autocast=False,
        )

    def _build_packed(self):
        quantizer, size = self.weight_quantizer, (self.in_features, self.out_features)
        fixed = {"initializer": UntouchedZeros(), "trainable": False, "autocast": False}
        tiles = layout.tiles_shape(*size, quantizer.bits, self.packed_layout)
        scale = quantizer.scale_shape(*size)
        self.kernel_tiles = self.add_weight(
            name="kernel_tiles", shape=tiles, dtype="uint8", **fixed
        )
        self.kernel_scale = self.add_weight(
            name="kernel_scale", shape=scale, dtype="float32", **fixed
        )

    def build_bias(self, shape):
        """Creates the bias; a subclass that has one calls it in `build`, after `build_kernel`."""
        self.bias = self.add_weight(
            name="bias",
            shape=shape,
            initializer=self.bias_initializer,
            regularizer=self.bias_regularizer,
            constraint=self.bias_constraint,
        )

    def _initial_kernel(self, shape, dtype=None):
        """Initializes as a matrix, so that fan-in and fan-out are those of the product."""
        matrix = self.kernel_initializer((self.in_features, self.out_features), dtype=dtype)
        return self.matrix_to_kernel(matrix)

    def _initial_log2_scale(self, shape=None, dtype=None):
        matrix = self.without_kept_rows(self.kernel_matrix())
        return ops.log2(self.weight_quantizer.compute_scale(matrix))

    def reset_scale(self):
        """Starts a learned scale again from the kernel, after the kernel was replaced."""
        if self.kernel_log2_scale is not None:
            self.kernel_log2_scale.assign(self._initial_log2_scale())

    def check_precision(self, quantizer):
        """Raises a `ValueError` where `change_precision` would."""
        size, present = (self.in_features, self.out_features), self.weight_quantizer
        same = quantizer.learned == present.learned
        if quantizer.learned and same:
            same = quantizer.scale_shape(*size) == present.scale_shape(*size)
        if self.packed or not same:
            raise ValueError(
                f"Layer '{self.name}' ({'packed' if self.packed else 'not packed'}) cannot change "
                f"from {present!r} to {quantizer!r}: a packed layer cannot change, and a learned "
                "scale is a variable that must have the same shape before and after."
            )

    def take_quantizer(self, quantizer):
        """Another weight quantizer; a learned scale starts again from the kernel."""
        super().take_quantizer(quantizer)
        self.packed_layout = "tiles"  # of no meaning here; another might not suit the codes
        self.reset_scale()

    def learned_scale(self):
        """The trained scale of the float kernel as a tensor, or `None`: it is computed."""
        if self.kernel_log2_scale is None:
            return None
        return ops.power(2.0, ops.convert_to_tensor(self.kernel_log2_scale))

    def kernel_to_matrix(self, kernel):
        """Reshapes a float kernel to `(in_features, out_features)`."""
        return kernel

    def matrix_to_kernel(self, matrix):
        """The inverse of `kernel_to_matrix`."""
        return matrix

    def kernel_matrix(self):
        """The float kernel as a tensor `(in_features, out_features)`."""
        return self.kernel_to_matrix(ops.convert_to_tensor(self.kernel))

    # -- computation -----------------------------------------------------------------------

    def product(self, x, bias=None):
        """Multiplies rows by the kernel: normalized, quantized or packed, with LoRA.

        Args:
            x: Tensor `(..., in_features)`.
            bias: Tensor `(out_features,)` or `None`.

        Returns:
            Tensor `(..., out_features)`.
        """
        x = self.normalize_inputs(x)
        y = self._quantized_product(self.smooth(x), bias)
        if self.lora_enabled:
            low_rank = ops.matmul(ops.matmul(x, self.lora_kernel_a), self.lora_kernel_b)
            y = y + ops.cast(low_rank * (self.lora_alpha / self.lora_rank), y.dtype)
        y = self.shape_outputs(y)
        if self.normalization is not None and self.norm_position == "post":
            y = self.normalization(y)
        return y

    def shape_outputs(self, y):
        """What a subclass does to a product before the norm after it; nothing here."""
        return y

    def _quantized_product(self, x, bias):
        quantizer = self.activation_quantizer
        if self._look is not None:  # calibration: it sees the inputs, and they stay float
            self._look(self, x)
            quantizer = None
        x, kept = self.split_channels(self.rotate(x))
        if self.packed:
            scale = None if quantizer is None else self.scale_for(x)
            y = bit_matmul(x, self.packed_kernel, quantizer, bias, scale)
            return y if kept is None else y + self.kept_product(kept)
        strength = ops.convert_to_tensor(self.quantization_strength)
        if quantizer is not None:
            x = self.fake_quantize_inputs(x, strength)
        y = ops.matmul(x, self.fake_quantized_matrix(strength, x.dtype))
        if kept is not None:
            y = y + self.kept_product(kept, strength)
        return y if bias is None else ops.add(y, bias)

    def fake_quantized_matrix(self, strength=None, dtype=None):
        """The kernel `(in_features, out_features)` that QAT multiplies with; `float32`."""
        scale = self.learned_scale()
        matrix = self.without_kept_rows(self.kernel_matrix())
        return self.weight_quantizer.fake_quantize(matrix, scale, strength, dtype)

    def quantized_matrix(self):
        """The `QuantizedWeight` of the float kernel, at full strength."""
        matrix = self.without_kept_rows(self.kernel_matrix())
        return self.weight_quantizer.quantize(matrix, self.learned_scale())

    @property
    def packed_kernel(self):
        """The kernel of a packed layer as a `PackedTensor`."""
        if not self.packed:
            raise ValueError(
                f"Layer '{self.name}' is not packed: pack the model with "
                "`keras_bitnet.pack_model(model)`."
            )
        return PackedTensor(
            tiles=ops.convert_to_tensor(self.kernel_tiles),
            scale=ops.convert_to_tensor(self.kernel_scale),
            offset=self.weight_quantizer.offset,
            bits=self.weight_quantizer.bits,
            in_features=self.in_features,
            out_features=self.out_features,
            group_size=self.weight_quantizer.group_size,
            layout=self.packed_layout,
        )

    def compute_mask(self, inputs, previous_mask):
        """The mask of the inputs, unchanged."""
        return previous_mask

    def take_weights(self, layer):
        """Copies the weights of the float Keras layer that this one replaces, LoRA merged."""
        matrix = self.adapt_matrix(self.kernel_to_matrix(ops.copy(layer.kernel)))
        self.kernel.assign(self.matrix_to_kernel(matrix))
        if layer.bias is not None:
            assign_copy(self.bias, layer.bias)
        self.reset_scale()
        self.mark_untrained()

    # -- packing ---------------------------------------------------------------------------

    def pack_from(self, layer):
        """Fills the packed kernel of this layer from the float kernel of its twin.

        Raises:
            ValueError: The kernel holds a NaN or an infinity, or the activations are static and
                have no scale yet.
        """
        if layer.static and not layer.calibrated:
            raise ValueError(
                f"Layer '{layer.name}' has static activations and no scale for them yet. Call "
                "`keras_bitnet.calibrate(model, data)`, or train it with a momentum "
                "(`StaticActivation(momentum=0.99)`)."
            )
        if not np.isfinite(ops.convert_to_numpy(layer.kernel)).all():
            raise ValueError(
                f"The kernel of layer '{layer.name}' holds a NaN or an infinity and cannot be "
                "packed. Train it again with a lower learning rate, or load other weights."
            )
        quantizer = self.weight_quantizer
        codes, scale, offset = layer.quantized_matrix()
        packed = PackedTensor.from_codes(
            codes, scale, offset, quantizer.bits, quantizer.group_size, self.packed_layout
        )
        self.kernel_tiles.assign(packed.tiles)
        self.kernel_scale.assign(packed.scale)
        self.pack_kept_from(layer)

    def unpack_from(self, layer):
        """Fills the float kernel of this layer so that it quantizes to the codes of its twin."""
        packed = layer.packed_kernel
        quantized = quantizers.QuantizedWeight(packed.codes(), packed.scale, packed.offset)
        kernel = self.unpack_kept_from(self.weight_quantizer.restore(quantized), layer)
        self.kernel.assign(self.matrix_to_kernel(kernel))
        if self.kernel_log2_scale is not None:
            self.kernel_log2_scale.assign(ops.log2(packed.scale))

    def mark_untrained(self):
        """Remembers that the present kernel comes from float training, not from QAT."""
        self._untrained_checksum = self._kernel_checksum()

    @property
    def untrained(self):
        """Whether the kernel is still the one that `mark_untrained` saw."""
        return self._untrained_checksum is not None and (
            self._untrained_checksum == self._kernel_checksum()
        )

    def _kernel_checksum(self):
        return zlib.crc32(ops.convert_to_numpy(self.kernel).tobytes())

    def get_config(self):
        """The arguments of the constructor."""
        config = {
            "weight_quantizer": quantizers.serialize(self.weight_quantizer),
            "activation_quantizer": quantizers.serialize(self.activation_quantizer),
            "norm": self.norm,
            "norm_position": self.norm_position,
            "norm_epsilon": self.norm_epsilon,
            "quantization_strength": self._initial_strength,
            "packed": self.packed,
            "packed_layout": self.packed_layout,
            "activation": activations.serialize(self.activation),
            "kernel_initializer": initializers.serialize(self.kernel_initializer),
            "bias_initializer": initializers.serialize(self.bias_initializer),
            "kernel_regularizer": regularizers.serialize(self.kernel_regularizer),
            "bias_regularizer": regularizers.serialize(self.bias_regularizer),
            "kernel_constraint": constraints.serialize(self.kernel_constraint),
            "bias_constraint": constraints.serialize(self.bias_constraint),
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


def assign_copy(target, source):
    """Assigns a variable a copy of another: on JAX, `fit` would delete a shared array."""
    target.assign(ops.copy(source))


def under_own_names(layer, config):
    """Arguments of `BitLayer` under the names that a layer or class has for them."""
    own = {layer.own_names.get(name, name): value for name, value in config.items()}
    return {name: value for name, value in own.items() if name is not None}


def smallest_layout(quantizer):
    """The layout that holds the codes of a `WeightQuantizer` in the fewest bytes."""
    fits = quantizer.level_count == 3 and quantizer.group_size is None
    return "trits" if fits else "tiles"


def _check_layout(packed_layout, quantizer):
    check_choice("packed_layout", packed_layout, ("tiles", smallest_layout(quantizer)))


def _check_arguments(layer, norm, norm_position, quantization_strength, lora_rank):
    if norm is not None and norm not in NORMS:
        raise ValueError(f"`norm` must be None or one of {sorted(NORMS)}. Received: norm={norm!r}")
    if norm_position not in ("pre", "post"):
        raise ValueError(
            f"`norm_position` must be 'pre' or 'post'. Received: norm_position={norm_position!r}"
        )
    if not 0 <= quantization_strength <= 1:
        raise ValueError(
            "`quantization_strength` must lie in [0, 1]. "
            f"Received: quantization_strength={quantization_strength}"
        )
    if lora_rank is not None:
        check_rank(lora_rank)
