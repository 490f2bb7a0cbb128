"""A few input channels that keep 8 or 16 bits beside coarser ones."""

import math
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_bitnet import quantizers
from keras_bitnet.checks import check_choice, check_count, check_own_names
from keras_bitnet.ops import layout
from keras_bitnet.ops.bit_matmul import bit_matmul
from keras_bitnet.ops.packed_tensor import PackedTensor, expand_scale
from keras_bitnet.ops.ste import blend, straight_through

_WEIGHT = quantizers.Int8()
_ACTIVATION = quantizers.ActivationInt8()


class KeptChannels(keras.Layer):
    """Mixin of `BitLayer`: some channels and their rows of the kernel are multiplied apart.

        y = quantize(x without them) @ quantize(kernel) + x[kept] @ kernel[kept]

    Args:
        kept_channels: How many; `calibrate` chooses those of the largest magnitude.
        kept_bits: 8: inputs in 8 bits per token, rows in 8 bits per output. 16: inputs as they
            are, rows in float16.

    Source:
        Dettmers et al. 2022, LLM.int8 (https://arxiv.org/abs/2208.07339), which chooses them
        anew for each batch.
    """

    def __init__(self, *, kept_channels=0, kept_bits=16, **kwargs):
        super().__init__(**kwargs)
        check_count("kept_channels", kept_channels, least=0)
        check_own_names(self, kept_channels=kept_channels or None)
        check_choice("kept_bits", kept_bits, (8, 16))
        self.kept_channels = kept_channels
        self.kept_bits = kept_bits
        self.kept_indices: Any = None
        self.kernel_kept: Any = None
        self.kernel_kept_scale: Any = None

    def build_kept(self):
        """Creates the weights of the kept channels; `build_kernel` calls it."""
        if not self.kept_channels:
            return
        if self.kept_channels >= self.in_features:
            raise ValueError(
                f"Layer '{self.name}' has {self.in_features} inputs and cannot keep as many "
                f"apart. Received: kept_channels={self.kept_channels}"
            )
        fixed = {"trainable": False, "autocast": False}
        count = self.kept_channels
        self.kept_indices = self.add_weight(
            name="kept_indices", shape=(count,), dtype="int32", initializer=_arange, **fixed
        )
        if self.packed:
            size = (count, self.out_features)
            shape = layout.tiles_shape(*size, 8) if self.kept_bits == 8 else size
            dtype = "uint8" if self.kept_bits == 8 else "float16"
            self.kernel_kept = self.add_weight(
                name="kernel_kept", shape=shape, dtype=dtype, initializer="zeros", **fixed
            )
            if self.kept_bits == 8:
                self.kernel_kept_scale = self.add_weight(
                    name="kernel_kept_scale", shape=_WEIGHT.scale_shape(*size), dtype="float32",
                    initializer="zeros", **fixed,
                )  # fmt: skip

    def split_channels(self, x):
        """Inputs `(..., in_features)` as `(x without the kept ones, kept ones or None)`."""
        if not self.kept_channels:
            return x, None
        kept = ops.take(x, ops.convert_to_tensor(self.kept_indices), axis=-1)
        return x * ops.cast(self._others(), x.dtype), kept

    def without_kept_rows(self, matrix):
        """A kernel `(in_features, out_features)` with zeros in the kept rows."""
        return matrix * self._others()[:, None] if self.kept_channels else matrix

    def _others(self):
        """1 for the channels that are not kept, 0 for those that are."""
        kept = ops.one_hot(ops.convert_to_tensor(self.kept_indices), self.in_features)
        return 1 - ops.max(ops.cast(kept, "float32"), axis=0)

    def kept_product(self, kept, strength=None):
        """The product of the kept channels `(..., kept_channels)` with their rows."""
        if self.packed and self.kept_bits == 8:
            return bit_matmul(kept, self._packed_rows(), _ACTIVATION)
        if self.packed:
            rows = ops.cast(ops.convert_to_tensor(self.kernel_kept), "float32")
        else:
            rows = self._kept_rows()
            if self.kept_bits == 8:
                kept = _ACTIVATION.fake_quantize(kept, strength=strength)
                rows = _WEIGHT.fake_quantize(rows, strength=strength)
            else:
                rounded = ops.cast(ops.cast(rows, "float16"), "float32")
                rows = straight_through(rows, blend(rows, rounded, strength))
        return ops.matmul(kept, ops.cast(rows, kept.dtype))

    def _kept_rows(self):
        return ops.take(self.kernel_matrix(), ops.convert_to_tensor(self.kept_indices), axis=0)

    def _packed_rows(self):
        return PackedTensor(
            ops.convert_to_tensor(self.kernel_kept),
            ops.convert_to_tensor(self.kernel_kept_scale),
            _WEIGHT.offset,
            _WEIGHT.bits,
            self.kept_channels,
            self.out_features,
        )

    @property
    def kept_bytes(self):
        """Bytes of the kept rows once packed."""
        if not self.kept_channels:
            return 0
        size = (self.kept_channels, self.out_features)
        if self.kept_bits == 16:
            return 2 * math.prod(size)
        return math.prod(layout.tiles_shape(*size, 8)) + 4 * math.prod(_WEIGHT.scale_shape(*size))

    def pack_kept_from(self, layer):
        """Fills the packed rows from the float kernel of a twin with the same indices."""
        if not self.kept_channels:
            return
        self.kept_indices.assign(ops.copy(layer.kept_indices))
        rows = layer._kept_rows()
        if self.kept_bits == 16:
            self.kernel_kept.assign(ops.cast(rows, "float16"))
            return
        codes, scale, offset = _WEIGHT.quantize(rows)
        packed = PackedTensor.from_codes(codes, scale, offset, _WEIGHT.bits)
        self.kernel_kept.assign(packed.tiles)
        self.kernel_kept_scale.assign(packed.scale)

    def unpack_kept_from(self, matrix, layer):
        """The restored kernel `(in_features, out_features)` with the rows of a packed twin."""
        if not self.kept_channels:
            return matrix
        self.kept_indices.assign(ops.copy(layer.kept_indices))
        matrix = self.without_kept_rows(matrix)
        quantizer = self.weight_quantizer
        if not quantizer.learned:  # the rows that are now zero had their part in a mean
            factor = layer.packed_kernel.scale / quantizer.compute_scale(matrix)
            matrix = matrix * expand_scale(factor, self.in_features, quantizer.group_size)
        rows = layer.kernel_kept
        if self.kept_bits == 8:
            rows = layer._packed_rows().dequantize()
        matrix = np.array(ops.convert_to_numpy(matrix))
        matrix[ops.convert_to_numpy(layer.kept_indices)] = ops.convert_to_numpy(rows)
        return matrix

    def get_config(self):
        """The arguments of the constructor, where they are not the default."""
        config = {"kept_channels": self.kept_channels, "kept_bits": self.kept_bits}
        return {**super().get_config(), **(config if self.kept_channels else {})}


def _arange(shape, dtype=None):
    return ops.arange(shape[0], dtype=dtype)
