"""The record of a GGUF block type: how many codes share a scale, and where their bits lie."""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np

HALF_BYTES = 2


@dataclasses.dataclass(frozen=True)
class BlockType:
    """A GGUF type whose rows are cut in blocks, each with a float16 scale `d`.

        w = d * step * (code + offset)

    Attributes:
        name: The name that `to_gguf(type=...)` takes.
        id: Number of the type in a tensor's header.
        file_type: `general.file_type` of a file that is mostly of this type.
        block_size: Consecutive inputs of an output that make a block.
        block_bytes: Bytes of a block, scale included.
        code_count: Codes are in `[0, code_count)`.
        offset: As in `PackedTensor`.
        pack: `pack(codes)`: `uint8 (blocks, block_size)` to `uint8 (blocks, block_bytes - 2)`.
        unpack: The inverse of `pack`.
        step: Factor between `d` and the scale of a `PackedTensor`.
        scale_first: Whether `d` stands before the codes of its block, or after them.
    """

    name: str
    id: int
    file_type: int
    block_size: int
    block_bytes: int
    code_count: int
    offset: float
    pack: Callable[[Any], Any]
    unpack: Callable[[Any], Any]
    step: float = 1.0
    scale_first: bool = True

    def encode(self, codes, scale):
        """Writes codes and scales as the bytes of a tensor's rows.

        Args:
            codes: `uint8` array `(out, in)`, below `code_count`; `in` fills whole blocks.
            scale: `float32` array that broadcasts to `(out, in / block_size)`, as in
                `PackedTensor`; it is rounded to float16.

        Returns:
            `uint8` array `(out, in / block_size * block_bytes)`.

        Raises:
            ValueError: The codes do not fit the type, or a scale is too large for float16.
        """
        self._check(codes)
        rows, columns = codes.shape
        blocks = columns // self.block_size
        with np.errstate(over="ignore"):
            half = (np.asarray(scale, np.float32) / np.float32(self.step)).astype("<f2")
        if not np.isfinite(half).all():
            raise ValueError(
                f"A scale does not fit in the float16 of '{self.name}'. "
                f"Received: scales up to {np.abs(scale).max():.4g}"
            )
        half = np.ascontiguousarray(np.broadcast_to(half, (rows, blocks))).reshape(-1, 1)
        digits = self.pack(codes.reshape(-1, self.block_size))
        parts = [half.view(np.uint8), digits]
        data = np.concatenate(parts if self.scale_first else parts[::-1], axis=1)
        return data.reshape(rows, blocks * self.block_bytes)

    def decode(self, data):
        """Reads the bytes that `encode` writes.

        Args:
            data: `uint8` array `(out, bytes)`, whole blocks.

        Returns:
            `(codes, scale)`: `uint8 (out, in)` and `float32 (out, in / block_size)`.

        Raises:
            ValueError: A row is no whole number of blocks, or holds a code that does not exist.
        """
        if data.ndim != 2 or data.dtype != np.uint8 or data.shape[1] % self.block_bytes:
            raise ValueError(
                f"Rows of '{self.name}' are uint8 in blocks of {self.block_bytes} bytes. "
                f"Received: {data.dtype} array of shape {data.shape}"
            )
        rows = data.shape[0]
        blocks = data.reshape(-1, self.block_bytes)
        cut = HALF_BYTES if self.scale_first else self.block_bytes - HALF_BYTES
        half, digits = (blocks[:, :cut], blocks[:, cut:])[:: 1 if self.scale_first else -1]
        scale = np.ascontiguousarray(half).view("<f2").astype(np.float32) * np.float32(self.step)
        codes = self.unpack(digits).reshape(rows, -1)
        if codes.size and codes.max() >= self.code_count:
            raise ValueError(
                f"'{self.name}' holds codes below {self.code_count}. Received: {codes.max()}. "
                "The data is corrupt or in another format."
            )
        return codes, scale.reshape(rows, -1)

    def _check(self, codes):
        if codes.ndim != 2 or codes.dtype != np.uint8 or codes.shape[1] % self.block_size:
            raise ValueError(
                f"'{self.name}' takes uint8 codes of shape (out, in), `in` a multiple of "
                f"{self.block_size}. Received: {codes.dtype} array of shape {codes.shape}"
            )
        if codes.size and codes.max() >= self.code_count:
            raise ValueError(
                f"'{self.name}' holds codes below {self.code_count}. Received: {codes.max()}"
            )


def shift_pack(codes, bits):
    """Joins axis 1 of `uint8 (blocks, 8 / bits, m)` to bytes `(blocks, m)`, the first lowest."""
    packed = np.zeros((len(codes), codes.shape[2]), np.uint8)
    for n in range(8 // bits):
        packed |= codes[:, n] << np.uint8(bits * n)
    return packed


def shift_unpack(packed, bits):
    """The inverse of `shift_pack`."""
    shifts = np.arange(0, 8, bits, dtype=np.uint8)[:, None]
    return (packed[:, None, :] >> shifts) & np.uint8(2**bits - 1)
