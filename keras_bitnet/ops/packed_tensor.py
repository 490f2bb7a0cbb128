"""The one record that crosses from quantizers to kernels."""

import dataclasses
from typing import Any

import numpy as np
from keras import ops

from keras_bitnet.ops.layout import check_layout, gather, pack, unpack


@dataclasses.dataclass(frozen=True)
class PackedTensor:
    """A packed weight matrix: `w = scale * (code + offset)`, codes in the tile layout.

    Attributes:
        tiles: `uint8` tensor, see `keras_bitnet.ops.layout`.
        scale: `float32` tensor `(1 or groups, 1 or out_features)`; it always multiplies.
        offset: Float, a multiple of 1/2.
        bits: Storage bits of a code: 1, 2, 4 or 8.
        in_features: Rows of the matrix it stands for.
        out_features: Columns of the matrix it stands for.
        group_size: Inputs that share a row of `scale`, or `None` for all.
        layout: How `tiles` holds the codes, `"tiles"` or `"trits"`.
    """

    tiles: Any
    scale: Any
    offset: float
    bits: int
    in_features: int
    out_features: int
    group_size: int | None = None
    layout: str = "tiles"

    @classmethod
    def from_codes(cls, codes, scale, offset, bits, group_size=None, layout="tiles"):
        """Packs the codes and scale that a quantizer gave.

        Args:
            codes: Integer array `(in, out)` with values in `[0, 2**bits)`.
            scale: Array `(1 or groups, 1 or out)`, finite.
            offset: Float, a multiple of 1/2.
            bits: 1, 2, 4 or 8.
            group_size: Inputs to a group, or `None`.
            layout: `"tiles"`, or for ternary codes without groups `"trits"`: 1.6 bits a weight.

        Returns:
            A `PackedTensor` of NumPy arrays.

        Raises:
            ValueError: A code is out of range, the scale has another shape or is not finite,
                or such codes have no such layout.
        """
        check_layout(layout, bits, group_size)
        codes = ops.convert_to_numpy(codes)
        scale = np.asarray(ops.convert_to_numpy(scale), np.float32)
        tiles = pack(codes, bits, layout)
        in_features, out_features = codes.shape
        groups = 1 if group_size is None else -(-in_features // group_size)
        if scale.shape not in {(groups, 1), (groups, out_features)}:
            raise ValueError(
                f"`scale` must have shape ({groups}, 1) or ({groups}, {out_features}) for codes "
                f"of shape {codes.shape} and group_size={group_size}. "
                f"Received: scale.shape={scale.shape}"
            )
        if not np.isfinite(scale).all():
            raise ValueError(
                "`scale` must be finite. Received: NaN or infinity, so the weights that it was "
                "computed from probably hold one too."
            )
        offset = float(offset)
        return cls(tiles, scale, offset, bits, in_features, out_features, group_size, layout)

    def codes(self):
        """The unsigned codes, `uint8` tensor `(in_features, out_features)`."""
        size = (self.in_features, self.out_features)
        return unpack(self.tiles, self.bits, *size, self.layout)

    def dequantize(self):
        """The weights as a `float32` tensor `(in_features, out_features)`."""
        values = ops.cast(self.codes(), "float32") + self.offset
        return ops.multiply(values, expand_scale(self.scale, self.in_features, self.group_size))

    def gather(self, columns):
        """The weights of chosen outputs; the rest of the matrix is not unpacked.

        Args:
            columns: Integer tensor `(...)` of outputs. One that is out of range is treated as
                `keras.ops.take` does on the backend: an error, or NaN on JAX.

        Returns:
            `float32` tensor `(..., in_features)`.
        """
        size = (self.in_features, self.out_features)
        codes = gather(self.tiles, columns, self.bits, *size, self.layout)
        groups = self.scale.shape[0]
        scale = ops.broadcast_to(self.scale, (groups, self.out_features))
        scale = ops.take(scale, columns, axis=1)  # (groups, ...)
        scale = ops.transpose(scale, (*range(1, len(scale.shape)), 0))
        if self.group_size is not None:
            scale = ops.repeat(scale, self.group_size, axis=-1)[..., : self.in_features]
        return (ops.cast(codes, "float32") + self.offset) * scale

    @property
    def nbytes(self):
        """Bytes of the packed codes and their scales."""
        return int(np.prod(self.tiles.shape)) + 4 * int(np.prod(self.scale.shape))


def expand_scale(scale, in_features, group_size):
    """Repeats the rows of a scale `(groups, n)` so that it broadcasts with `(in, n)`."""
    if group_size is None:
        return scale
    return ops.repeat(scale, group_size, axis=0)[:in_features]
