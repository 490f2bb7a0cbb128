"""Loading a `.keras` file without a copy of it in memory."""

import pathlib
import tempfile
import zipfile

import keras

from keras_bitnet.kernels import use_huge_pages


def load_model(filepath, custom_objects=None, compile=True, safe_mode=True):
    """`keras.models.load_model` for large models: the weights come straight from the disk.

    Keras reads the whole file into memory beside the model, so a packed model takes twice its
    size to load. Here the file is unzipped into a folder beside it, which is removed again, and
    each weight is read into its variable: the peak is little more than the model. Where no folder
    can be made beside it, Keras loads it. The weights then lie in huge pages, where
    the system has them (see `kernels.use_huge_pages`).

    Keras writes into the file what `jit_compile="auto"` became where it was written. From JAX that
    is True: TensorFlow would then compile a packed model by XLA, which cannot call the kernels, and
    PyTorch would spend minutes in `torch.compile`. A packed model that says so is loaded as if it
    said "auto".

    Args:
        filepath: Path of a `.keras` file.
        custom_objects, compile, safe_mode: As in Keras.

    Returns:
        The model.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is no `.keras` file.
    """
    path = pathlib.Path(filepath)
    if not path.is_file():
        raise FileNotFoundError(f"There is no file '{path}'.")
    if not zipfile.is_zipfile(path):
        raise ValueError(f"Expected a file that `model.save` wrote. Received: '{path}'")
    model = _load(path, custom_objects, compile, safe_mode)
    use_huge_pages(model)
    packed = any(getattr(layer, "packed", False) for layer in model._flatten_layers())
    if packed and getattr(model, "compiled", False) and model.jit_compile:
        model.jit_compile = None  # Keras then finds it anew
    return model


def _load(path, *options):
    """Reads the weights from files, if it can be done, else Keras's way."""
    try:
        beside = tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent)
    except OSError:  # a file system that is only read, such as that of a container
        return keras.saving.load_model(path, *options)
    with beside as folder:
        with zipfile.ZipFile(path) as archive:
            # Keras stores its files as they are; what is compressed could be of any size.
            if any(member.compress_type != zipfile.ZIP_STORED for member in archive.infolist()):
                return keras.saving.load_model(path, *options)
            archive.extractall(folder)
        return keras.saving.load_model(folder, *options)
