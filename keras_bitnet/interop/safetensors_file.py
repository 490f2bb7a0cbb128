"""Reading and writing the weights of a checkpoint folder: safetensors, one file or many."""

import json
import pathlib

import ml_dtypes  # noqa: F401 (gives NumPy the bfloat16 that safetensors asks it for)
import numpy as np

from keras_bitnet.interop.files import read_json, require

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
SHARDS = "model-?????-of-?????.safetensors"
WEIGHTS = (SINGLE, INDEX, SHARDS)  # all that `write_checkpoint` may write
SHARD_BYTES = 5 * 10**9
MAX_TENSORS = 1_000_000


class Checkpoint:
    """The tensors of a folder, memory-mapped; each is read when it is asked for.

    Use as a context manager. Nothing in the files is executed, and nothing is allocated that
    the files do not hold.

    Args:
        path: Folder with `model.safetensors`, or with `model.safetensors.index.json` and the
            files that it names; or the path of one `.safetensors` file.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: A file is corrupt, or the index names a file outside of its folder.
    """

    def __init__(self, path):
        self._safetensors = require("safetensors", "hf")
        self._opened: dict = {}
        path = pathlib.Path(path)
        folder = path if path.is_dir() else path.parent
        try:
            if path.is_dir() and not (path / SINGLE).is_file() and (path / INDEX).is_file():
                self._files = self._read_index(folder)
            else:
                file = path / SINGLE if path.is_dir() else path
                self._files = dict.fromkeys(self._open(file).keys(), file)
        except Exception:
            self.close()
            raise

    def _read_index(self, folder):
        weight_map = read_json(folder / INDEX).get("weight_map")
        if not isinstance(weight_map, dict) or len(weight_map) > MAX_TENSORS:
            raise ValueError(f"'{folder / INDEX}' has no `weight_map` from tensors to files.")
        files = {}
        for name, file in weight_map.items():
            plain = isinstance(file, str) and file.endswith(".safetensors") and "\0" not in file
            if not plain or "/" in file or "\\" in file or ":" in file:
                raise ValueError(
                    f"'{folder / INDEX}' may only name .safetensors files of its own folder. "
                    f"Received: {file!r} for '{name}'"
                )
            files[name] = folder / file
        for name, file in files.items():
            if name not in self._open(file).keys():  # noqa: SIM118 (no mapping)
                raise ValueError(
                    f"'{folder / INDEX}' says that '{file.name}' holds '{name}'; it does not."
                )
        return files

    def _open(self, file):
        if file not in self._opened:
            if not file.is_file():
                raise FileNotFoundError(f"There is no file '{file}'.")
            try:
                self._opened[file] = self._safetensors.safe_open(file, framework="numpy")
            except (self._safetensors.SafetensorError, OSError) as error:
                raise ValueError(f"'{file}' is no valid safetensors file: {error}") from error
        return self._opened[file]

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def close(self):
        """Closes the files."""
        self._opened.clear()

    def keys(self):
        """Names of all tensors."""
        return self._files.keys()

    def __contains__(self, name):
        return name in self._files

    def shape(self, name):
        """Shape of a tensor."""
        return tuple(self._slice(name).get_shape())

    def dtype(self, name):
        """Type of a tensor as the format names it: `"F32"`, `"BF16"`, `"U8"`, ..."""
        return self._slice(name).get_dtype()

    def _slice(self, name):
        self._check_name(name)
        return self._open(self._files[name]).get_slice(name)

    def _check_name(self, name):
        if name not in self._files:
            near = [key for key in self._files if key.rpartition(".")[0] == name.rpartition(".")[0]]
            raise ValueError(
                f"The checkpoint holds no tensor '{name}'."
                + (f" It holds {near[:4]}." if near else "")
            )

    def read(self, name, shape, dtypes):
        """Reads a tensor.

        Args:
            name: Its name.
            shape: The shape that it must have.
            dtypes: The types that it may have, as in `dtype`.

        Returns:
            NumPy array.

        Raises:
            ValueError: It is missing or has another shape or type.
        """
        self._checked(name, shape, dtypes)
        return self._open(self._files[name]).get_tensor(name)

    def rows(self, name, shape, dtypes):
        """A matrix as `read` gives it, but slices of its rows are read when they are asked for."""
        return Rows(self._checked(name, shape, dtypes))

    def _checked(self, name, shape, dtypes):
        found = self._slice(name)
        if tuple(found.get_shape()) != tuple(shape) or found.get_dtype() not in dtypes:
            raise ValueError(
                f"Tensor '{name}' must have shape {tuple(shape)} and one of the types "
                f"{tuple(dtypes)}. Received: {found.get_dtype()} of shape "
                f"{tuple(found.get_shape())}"
            )
        return found


class Rows:
    """A matrix in a file: `shape`, and slices of rows as NumPy arrays."""

    def __init__(self, found):
        self._slice = found
        self.shape = tuple(found.get_shape())

    def __getitem__(self, rows):
        start, stop, _ = rows.indices(self.shape[0])  # safetensors refuses ends beyond the last
        return self._slice[start:stop]


def write_checkpoint(folder, tensors, shard_bytes=SHARD_BYTES):
    """Writes tensors as one file or as many with an index.

    Args:
        folder: An existing folder.
        tensors: Iterable of `(name, array)`; it is read once, and at most `shard_bytes` of it
            are in memory.
        shard_bytes: Bytes of a file, one tensor at least.
    """
    save_file = require("safetensors.numpy", "hf").save_file
    folder = pathlib.Path(folder)
    shards: list[list[str]] = []
    shard: dict[str, np.ndarray] = {}

    def flush():
        file = folder / _shard_name(len(shards))
        file.touch()
        mode = file.stat().st_mode
        save_file(shard, file, metadata={"format": "pt"})
        file.chmod(mode)  # safetensors makes files for their owner alone
        shards.append(list(shard))
        shard.clear()

    total = 0
    for name, array in tensors:
        array = np.ascontiguousarray(array)
        held = sum(other.nbytes for other in shard.values())
        if shard and held + array.nbytes > shard_bytes:
            flush()
        shard[name] = array
        total += array.nbytes
    flush()
    if len(shards) == 1:
        (folder / _shard_name(0)).rename(folder / SINGLE)
        return
    weight_map = {}
    for i, names in enumerate(shards):
        file = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        (folder / _shard_name(i)).rename(folder / file)
        weight_map.update(dict.fromkeys(names, file))
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _shard_name(i):
    return f"part-{i}.safetensors"
