"""Reading GGUF files: a bounded parser of the header, memory-mapped tensors.

The reader of the `gguf` package trusts the counts of a header (an array said to have 2**60
items fills the memory) and knows neither Q2_0 nor bitnet.cpp's I2_S; so the header is read here,
every count against the bytes that are there. Blocks are dequantized by that package.
"""

import dataclasses
import math
import mmap
import pathlib
import struct

import numpy as np

from keras_bitnet.interop.codecs import BLOCK_TYPES, i2_s
from keras_bitnet.interop.files import require

MAGIC = b"GGUF"
VERSIONS = (2, 3)
MAX_KEYS = 65_536
MAX_TENSORS = 1_000_000
MAX_NAME = 1_024
MAX_DIMENSIONS = 4
MAX_ITEMS = 2**22  # of an array: a large vocabulary has 2**19 merges
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q",
            12: "d"}  # fmt: skip
_STRING, _ARRAY = 8, 9
_OURS = {block.id: block for block in BLOCK_TYPES.values()}


@dataclasses.dataclass(frozen=True)
class TensorInfo:
    """What the header says of a tensor.

    Attributes:
        name: Its name.
        shape: As NumPy has it: `(out, in)`. The file has the dimensions reversed.
        type_id: Number of its GGUF type.
        offset: Where its bytes begin in the file.
        nbytes: How many there are.
    """

    name: str
    shape: tuple[int, ...]
    type_id: int
    offset: int
    nbytes: int


class GGUFFile:
    """A GGUF file: `metadata` (a dictionary), `tensors` (a dictionary of `TensorInfo`).

    Use as a context manager.

    Args:
        path: Path of the file.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is no GGUF file, of an unknown version, truncated, or its header asks for
            more than the file holds.
    """

    def __init__(self, path):
        self.path = pathlib.Path(path)
        if not self.path.is_file():
            raise FileNotFoundError(f"There is no file '{self.path}'.")
        if not self.path.stat().st_size:
            raise ValueError(f"'{self.path}' is empty.")
        with open(self.path, "rb") as file:
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        try:
            self.metadata, self.tensors = _Header(self._map, self.path).parse()
        except ValueError:
            self._map.close()
            raise

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def close(self):
        """Closes the file; arrays that `read` gave are copies or keep it mapped."""
        try:
            self._map.close()
        except BufferError:  # an array still looks into it; it closes with that
            self._map = None  # type: ignore[assignment]

    def __contains__(self, name):
        return name in self.tensors

    def info(self, name, shape=None):
        """The `TensorInfo` of a name, of the shape that is expected.

        Raises:
            ValueError: There is none, or it has another shape.
        """
        if name not in self.tensors:
            raise ValueError(f"'{self.path}' holds no tensor '{name}'.")
        info = self.tensors[name]
        if shape is not None and info.shape != tuple(shape):
            raise ValueError(
                f"Tensor '{name}' of '{self.path}' must have shape {tuple(shape)}. "
                f"Received: {info.shape}"
            )
        return info

    def bytes(self, name):
        """The bytes of a tensor as they lie in the file, a `uint8` array without a copy."""
        info = self.info(name)
        return np.frombuffer(self._map, np.uint8, info.nbytes, info.offset)

    def codes(self, name, shape):
        """Codes and scales of a tensor of a type that has them, or `None`.

        Returns:
            `(codes, scale, offset)`: `uint8 (out, in)`, `float32 (out, blocks)` or `(1, 1)`,
            and a float: `w = scale * (code + offset)`.
        """
        info = self.info(name, shape)
        if info.type_id == i2_s.ID:
            return (*i2_s.decode(self.bytes(name), info.shape), -1.0)
        block = _OURS.get(info.type_id)
        if block is None:
            return None
        codes, scale = block.decode(self.bytes(name).reshape(info.shape[0], -1))
        return codes, scale, block.offset

    def floats(self, name, shape):
        """A tensor as `float32`, dequantized if need be."""
        info = self.info(name, shape)
        found = self.codes(name, shape) if len(info.shape) == 2 else None
        if found is not None:
            codes, scale, offset = found
            levels = codes.astype(np.float32) + np.float32(offset)
            blocks = levels.reshape(*scale.shape, -1) if scale.size > 1 else levels
            scale = scale[..., None] if scale.size > 1 else scale
            return (blocks * scale).reshape(info.shape)
        gguf = require("gguf", "gguf")
        data = self.bytes(name).reshape(*info.shape[:-1], -1)
        try:
            kind = gguf.GGMLQuantizationType(info.type_id)
            values = gguf.quants.dequantize(data, kind)
        except (ValueError, NotImplementedError) as error:
            raise ValueError(
                f"Tensor '{name}' of '{self.path}' has GGUF type {info.type_id}, which cannot be "
                f"read: {error}"
            ) from error
        return np.array(values, np.float32).reshape(info.shape)


class _Header:
    """A cursor over the header that never goes beyond the file."""

    def __init__(self, data, path):
        self.data, self.path, self.at, self.size = data, path, 0, len(data)

    def parse(self):
        """Returns `(metadata, tensors)`."""
        if self._take(4) != MAGIC:
            raise ValueError(f"'{self.path}' is no GGUF file.")
        version = self._scalar("I")
        if version not in VERSIONS:
            raise ValueError(
                f"'{self.path}' must be a little-endian GGUF file of version {VERSIONS}. "
                f"Received: version {version}"
            )
        tensor_count, key_count = self._count(MAX_TENSORS, 24), self._count(MAX_KEYS, 13)
        metadata: dict = {}
        for _ in range(key_count):
            key = self._string(MAX_NAME)
            if key in metadata:
                raise self._corrupt(f"the key '{key}' occurs twice")
            metadata[key] = self._value(self._scalar("I"))
        infos = [self._tensor() for _ in range(tensor_count)]
        alignment = metadata.get("general.alignment", 32)
        power = isinstance(alignment, int) and 0 < alignment <= 2**20
        if not power or alignment & (alignment - 1):
            raise self._corrupt(f"the alignment {alignment!r} is no power of two")
        start = -(-self.at // alignment) * alignment
        tensors: dict[str, TensorInfo] = {}
        for name, shape, type_id, offset in infos:
            if name in tensors:
                raise self._corrupt(f"the tensor '{name}' occurs twice")
            nbytes = _nbytes(name, shape, type_id)
            if offset % alignment or start + offset + nbytes > self.size:
                raise self._corrupt(
                    f"tensor '{name}' lies at {start + offset} with {nbytes} bytes, the file has "
                    f"{self.size}"
                )
            tensors[name] = TensorInfo(name, shape, type_id, start + offset, nbytes)
        return metadata, tensors

    def _corrupt(self, reason):
        return ValueError(f"'{self.path}' is truncated or corrupt: {reason}.")

    def _take(self, count):
        if count > self.size - self.at:
            raise self._corrupt(f"{count} bytes are to follow position {self.at}, the file ends")
        self.at += count
        return self.data[self.at - count : self.at]

    def _scalar(self, code):
        return struct.unpack("<" + code, self._take(struct.calcsize("<" + code)))[0]

    def _count(self, limit, item_bytes):
        """A count of items of at least `item_bytes` each, which must fit in the file."""
        count = self._scalar("Q")
        if count > limit or count * item_bytes > self.size - self.at:
            raise self._corrupt(f"{count} items are to follow position {self.at - 8}")
        return count

    def _string(self, limit=None):
        count = self._count(self.size if limit is None else limit, 1)
        try:
            return self._take(count).decode("utf-8")
        except UnicodeDecodeError as error:
            raise self._corrupt(f"a string is no UTF-8 ({error})") from error

    def _value(self, kind):
        if kind == _STRING:
            return self._string()
        if kind in _SCALARS:
            return self._scalar(_SCALARS[kind])
        if kind != _ARRAY:
            raise self._corrupt(f"a value has the unknown type {kind}")
        kind = self._scalar("I")
        if kind == _STRING:
            return [self._string() for _ in range(self._count(MAX_ITEMS, 8))]
        if kind not in _SCALARS:
            raise self._corrupt(f"an array has items of type {kind}")
        code = "<" + _SCALARS[kind]
        count = self._count(MAX_ITEMS, struct.calcsize(code))
        dtype = np.dtype(code) if code != "<?" else np.dtype(bool)
        return np.frombuffer(self._take(count * dtype.itemsize), dtype).tolist()

    def _tensor(self):
        name = self._string(MAX_NAME)
        dimensions = self._scalar("I")
        if not 1 <= dimensions <= MAX_DIMENSIONS:
            raise self._corrupt(f"tensor '{name}' has {dimensions} dimensions")
        shape = tuple(self._scalar("Q") for _ in range(dimensions))[::-1]
        if 0 in shape:
            raise self._corrupt(f"tensor '{name}' has the shape {shape}")
        return name, shape, self._scalar("I"), self._scalar("Q")


def _nbytes(name, shape, type_id):
    if type_id == i2_s.ID:
        return i2_s.nbytes(math.prod(shape))
    if type_id in _OURS:
        block_size, block_bytes = _OURS[type_id].block_size, _OURS[type_id].block_bytes
    else:
        constants = require("gguf.constants", "gguf")
        sizes = {int(kind): size for kind, size in constants.GGML_QUANT_SIZES.items()}
        if type_id not in sizes:
            raise ValueError(f"Tensor '{name}' has the unknown GGUF type {type_id}.")
        block_size, block_bytes = sizes[type_id]
    if shape[-1] % block_size:
        raise ValueError(
            f"Tensor '{name}' of GGUF type {type_id} has rows of {shape[-1]} values, no multiple "
            f"of {block_size}."
        )
    return math.prod(shape) // block_size * block_bytes
