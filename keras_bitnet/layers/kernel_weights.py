"""The weights of a product: a kernel that is float or packed, and its bias."""

import zlib
from typing import Any

import keras
import numpy as np
from keras import initializers, ops

from keras_bitnet import quantizers
from keras_bitnet.layers.large_weights import UntouchedZeros
from keras_bitnet.layers.named_weights import NamedWeights
from keras_bitnet.ops import layout
from keras_bitnet.ops.packed_tensor import PackedTensor

MEMORY = ("fastest", "smallest")  # what packed codes are laid out for


class KernelWeights(NamedWeights):
    """Mixin of `BitLayer`: the kernel and its scale, from float to codes to packed and back.

    It takes its arguments, quantizers and initializers, from `BitLayer`.
    """

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.bias: Any = None
        self.kernel: Any = None
        self.kernel_log2_scale: Any = None
        self.kernel_scale: Any = None
        self.kernel_tiles: Any = None
        self.quantization_strength: Any = None
        self._untrained_checksum: int | None = None

    def build_kernel(self, in_features, out_features, kernel_shape=None):
        """Creates the weights of the product; a subclass calls it in `build`.

        Args:
            in_features: Rows of the kernel as a matrix.
            out_features: Columns of the kernel as a matrix.
            kernel_shape: Shape of the float kernel, `(in_features, out_features)` by default.
        """
        self.in_features, self.out_features = in_features, out_features
        self._kernel_shape = tuple(kernel_shape or (in_features, out_features))
        self.build_inputs()
        self.build_kept()
        if self.packed:
            self._build_packed()
        else:
            self._build_float()
        if self.normalization is not None:
            size = in_features if self.norm_position == "pre" else out_features
            self.normalization.build((None, size))

    def _build_float(self):
        # Codes come from the float32 master weight, so kernel and scale are never autocast.
        self.kernel = self.add_weight(
            name="kernel",
            shape=self._kernel_shape,
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
        """Drawn in the shape of Keras, by which its initializers know fan-in and fan-out."""
        return self.kernel_initializer(shape, dtype=dtype)

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
        if len(kernel.shape) == 2:
            return kernel
        return ops.reshape(kernel, (self.in_features, self.out_features))

    def matrix_to_kernel(self, matrix):
        """The inverse of `kernel_to_matrix`."""
        return ops.reshape(matrix, self._kernel_shape)

    def kernel_matrix(self):
        """The float kernel as a `float32` tensor `(in_features, out_features)`."""
        return self.kernel_to_matrix(ops.cast(ops.convert_to_tensor(self.kernel), "float32"))

    def take_kernel(self, kernel):
        """Copies a float kernel for inputs that are not treated."""
        kernel = ops.cast(ops.copy(kernel), "float32")
        matrix = self.adapt_matrix(self.kernel_to_matrix(kernel))
        self.kernel.assign(self.matrix_to_kernel(matrix))
        self.reset_scale()

    def take_weights(self, layer):
        """Copies the weights of the float Keras layer that this one replaces, LoRA merged."""
        self.take_kernel(layer.kernel)
        if layer.bias is not None:
            assign_copy(self.bias, layer.bias)
        self.mark_untrained()

    # -- codes ------------------------------------------------------------------------------

    def fake_quantized_matrix(self, strength=None, dtype=None):
        """The kernel `(in_features, out_features)` that QAT multiplies with; `float32`."""
        scale = self.learned_scale()
        matrix = self.without_kept_rows(self.kernel_matrix())
        return self.weight_quantizer.fake_quantize(matrix, scale, strength, dtype)

    def matrix_in_use(self, dtype=None):
        """The kernel `(in_features, out_features)` that the layer multiplies with, as it is now.

        Packed it is dequantized, else blended by `quantization_strength`; kept rows are left out.
        """
        if self.packed:
            return self.packed_kernel.dequantize()
        return self.fake_quantized_matrix(ops.convert_to_tensor(self.quantization_strength), dtype)

    def quantized_matrix(self):
        """The `QuantizedWeight` of the kernel, packed or float, at full strength."""
        if self.packed:
            packed = self.packed_kernel
            return quantizers.QuantizedWeight(packed.codes(), packed.scale, packed.offset)
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
        # Keras takes microseconds to make a tensor of a variable.
        tiles, scale = self.kernel_tiles.value, self.kernel_scale.value
        if keras.backend.backend() == "torch":
            scale = scale.float()  # `module.half()` reaches it too
        return PackedTensor(
            tiles=tiles,
            scale=scale,
            offset=self.weight_quantizer.offset,
            bits=self.weight_quantizer.bits,
            in_features=self.in_features,
            out_features=self.out_features,
            group_size=self.weight_quantizer.group_size,
            layout=self.packed_layout,
        )

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
        quantized = layer.quantized_matrix()
        kernel = self.unpack_kept_from(self.weight_quantizer.restore(quantized), layer)
        self.kernel.assign(self.matrix_to_kernel(kernel))
        if self.kernel_log2_scale is not None:
            self.kernel_log2_scale.assign(ops.log2(quantized.scale))

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


def assign_copy(target, source):
    """Assigns a variable a copy of another: on JAX, `fit` would delete a shared array."""
    target.assign(ops.copy(source))


def layout_for(memory, quantizer):
    """The layout of the packed codes of a `WeightQuantizer`, `"tiles"` or `"trits"`.

    Args:
        memory: `"fastest"`: what kernels read best. `"smallest"`: the fewest bytes.
        quantizer: The `WeightQuantizer`.
    """
    smaller = quantizer.level_count == 3 and quantizer.group_size is None
    return "trits" if memory == "smallest" and smaller else "tiles"
