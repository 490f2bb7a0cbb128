"""Matrices in and out of layers, `(out, in)` as outside files have them, one at a time."""

from typing import Any, NamedTuple

import keras
import numpy as np
from keras import ops

from keras_bitnet.layers.base import BitLayer
from keras_bitnet.layers.large_weights import fill
from keras_bitnet.ops import PackedTensor, layout


class Codes(NamedTuple):
    """A quantized matrix: `w = scale * (codes + offset)`.

    Attributes:
        codes: `uint8` array `(out, in)`.
        scale: `float32` array `(out or 1, groups or 1)`.
        offset: Float.
    """

    codes: Any
    scale: Any
    offset: float


def set_codes(layer, codes, scale):
    """Fills a packed layer with codes.

    Args:
        layer: Packed `BitLayer`.
        codes: `uint8` array `(out, in)`.
        scale: `float32` array `(out or 1, groups or 1)`; it multiplies.
    """
    quantizer = layer.weight_quantizer
    packed = PackedTensor.from_codes(
        np.ascontiguousarray(codes.T),
        np.ascontiguousarray(scale.T),
        quantizer.offset,
        quantizer.bits,
        quantizer.group_size,
        layer.packed_layout,
    )
    layer.kernel_tiles.assign(packed.tiles)
    layer.kernel_scale.assign(np.broadcast_to(packed.scale, layer.kernel_scale.shape))


def set_matrix(layer, matrix):
    """Fills a layer with a float matrix `(out, in)`; a packed layer quantizes it.

    Args:
        layer: Any layer with one matrix.
        matrix: NumPy array, or an object with a `shape` whose slices of rows are arrays. A table of
            tokens and a packed kernel with scales per output are filled some rows at a time.

    Raises:
        ValueError: It holds a NaN or an infinity.
    """
    rows = _FloatRows(matrix, layer.name)
    if _packs_in_blocks(layer):
        _set_in_blocks(layer, rows)
        return
    if isinstance(layer, keras.layers.Embedding):
        fill(layer.embeddings, rows)
        return
    matrix = rows[:]
    if not isinstance(layer, BitLayer):
        layer.kernel.assign(matrix.T)
    elif layer.packed:
        quantized = layer.weight_quantizer.quantize(ops.transpose(ops.convert_to_tensor(matrix)))
        codes, scale = (ops.convert_to_numpy(x).T for x in quantized[:2])
        set_codes(layer, codes, scale)
    else:
        kernel = ops.transpose(ops.convert_to_tensor(matrix))
        layer.kernel.assign(layer.matrix_to_kernel(kernel))
        layer.reset_scale()


class _FloatRows:
    """Rows of a matrix as float32, which are finite."""

    def __init__(self, matrix, name):
        self._matrix, self._name = matrix, name
        self.shape = tuple(matrix.shape)
        self.nbytes = 4 * int(np.prod(self.shape))

    def __getitem__(self, rows):
        block = np.asarray(self._matrix[rows], np.float32)
        if not np.isfinite(block).all():
            raise ValueError(f"The weights for layer '{self._name}' hold a NaN or an infinity.")
        return block if block.flags.writeable else block.copy()  # PyTorch warns otherwise

    def __array__(self, dtype=None, copy=None):
        return np.asarray(self[:], dtype)


def _packs_in_blocks(layer):
    """Whether the outputs of a packed layer have scales of their own, so one needs no other."""
    packed = isinstance(layer, BitLayer) and layer.packed
    return packed and layer.weight_quantizer.granularity != "tensor"


def _set_in_blocks(layer, matrix):
    """Packs some rows of a matrix `(out, in)` at a time: a table of tokens is large in float32."""
    packed = _PackedRows(layer, matrix)
    fill(layer.kernel_tiles, packed)
    layer.kernel_scale.assign(np.concatenate(packed.scales, axis=1))


class _PackedRows:
    """Tiles of rows of a matrix, packed as they are read, in order; `scales` keeps their scales."""

    def __init__(self, layer, matrix):
        self._layer, self._matrix = layer, matrix
        self.shape = tuple(layer.kernel_tiles.shape)
        self.nbytes = int(np.prod(self.shape))
        self.scales = []

    def __getitem__(self, tiles):
        rows = slice(tiles.start * layout.TILE_OUTPUTS, tiles.stop * layout.TILE_OUTPUTS)
        quantizer = self._layer.weight_quantizer
        codes, scale, offset = quantizer.quantize(ops.convert_to_tensor(self._matrix[rows].T))
        packed = PackedTensor.from_codes(
            codes, scale, offset, quantizer.bits, quantizer.group_size, self._layer.packed_layout
        )
        self.scales.append(ops.convert_to_numpy(packed.scale))
        return ops.convert_to_numpy(packed.tiles)

    def __array__(self, dtype=None, copy=None):
        return np.asarray(self[0 : self.shape[0]], dtype)


def get_matrix(layer):
    """The weights that a layer with one matrix multiplies with, `float32 (out, in)`."""
    if isinstance(layer, keras.layers.Embedding):
        return ops.convert_to_numpy(ops.cast(layer.embeddings, "float32"))
    if not isinstance(layer, BitLayer):
        return ops.convert_to_numpy(ops.cast(layer.kernel, "float32")).T
    return ops.convert_to_numpy(layer.matrix_in_use()).T


def get_master(layer):
    """The float weights of a layer before quantization; packed, ones that quantize alike."""
    if not layer.packed:
        return ops.convert_to_numpy(layer.kernel_matrix()).T
    return ops.convert_to_numpy(layer.weight_quantizer.restore(layer.quantized_matrix())).T


def get_codes(layer):
    """The `Codes` of a quantized layer, packed or not."""
    codes, scale, offset = layer.quantized_matrix()
    codes, scale = (ops.convert_to_numpy(x).T for x in (codes, scale))
    return Codes(np.ascontiguousarray(codes), np.ascontiguousarray(scale), float(offset))


def set_norm(layer, scale):
    """Fills the trained scale of a norm."""
    if tuple(layer.scale.shape) != tuple(scale.shape):
        raise ValueError(
            f"The norm '{layer.name}' has shape {tuple(layer.scale.shape)}. "
            f"Received: {tuple(scale.shape)}"
        )
    layer.scale.assign(np.asarray(scale, np.float32))


def get_norm(layer):
    """The trained scale of a norm, `float32`."""
    return ops.convert_to_numpy(ops.cast(layer.scale, "float32"))


def check_exportable(layer, name):
    """Refuses what no outside format holds.

    Raises:
        ValueError: The layer has LoRA weights, a bias, a static activation scale, or inputs that
            are rotated, smoothed or kept apart.
    """
    treatments = ("smoothing", "rotation", "kept_channels", "static")
    treated = [what for what in treatments if getattr(layer, what, None)]
    if treated:
        raise ValueError(
            f"'{name}' treats its inputs in a way that these formats do not hold. "
            f"Received: a layer with {', '.join(treated)}"
        )
    if layer.lora_enabled:
        raise ValueError(f"'{name}' has LoRA weights, which these formats do not hold.")
    if layer.bias is not None:
        raise ValueError(f"'{name}' has a bias, which these formats do not hold.")
