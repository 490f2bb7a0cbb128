"""What every format needs of files: optional packages, bounded reading, whole writing."""

import contextlib
import importlib
import json
import os
import pathlib
import tempfile

JSON_BYTES = 64 * 1024 * 1024  # a tokenizer.json of a large vocabulary has 20 MB


def require(module, extra):
    """Imports an optional package.

    Raises:
        ImportError: It is not installed; the message names the extra that brings it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise ImportError(
            f"This needs the package '{package}': `pip install keras-bitnet[{extra}]`. ({error})"
        ) from error


def read_text(path, limit=JSON_BYTES):
    """Reads a UTF-8 file of at most `limit` bytes.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is larger, or not UTF-8.
    """
    path = pathlib.Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"There is no file '{path}'.")
    size = path.stat().st_size
    if size > limit:
        raise ValueError(f"'{path}' is too large: at most {limit} bytes. Received: {size}")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"'{path}' is no UTF-8 text: {error}") from error


def read_json(path, limit=JSON_BYTES):
    """Reads a JSON object as a dictionary.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is larger than `limit` bytes, or no JSON object.
    """
    try:
        content = json.loads(read_text(path, limit))
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"'{path}' is no valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"'{path}' must hold a JSON object. Received: {type(content).__name__}")
    return content


@contextlib.contextmanager
def folder_written_whole(path, replaced=()):
    """Yields a temporary folder whose files are moved to the folder `path` if the block ends well.

    Files of other names that are in `path` already stay, but for those that match one of the
    patterns `replaced`: they belong to what was written there before.
    """
    path = pathlib.Path(path)
    if path.exists() and not path.is_dir():
        raise ValueError(f"`path` must be a folder. Received: the file '{path}'")
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as name:
        folder = pathlib.Path(name, path.name)
        folder.mkdir()
        yield folder
        path.mkdir(exist_ok=True)
        written = sorted(folder.iterdir())
        names = {file.name for file in written}
        for file in written:
            os.replace(file, path / file.name)
        for file in {file for pattern in replaced for file in path.glob(pattern)}:
            if file.name not in names:
                file.unlink()
