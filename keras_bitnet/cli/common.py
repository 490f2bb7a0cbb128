"""What the commands share: model files, data files, outputs."""

import pathlib
import zipfile

from keras_bitnet.files import replacing


def add_model(parser):
    """Adds the argument FILE."""
    parser.add_argument("file", metavar="FILE", help="a model saved as .keras (or .h5)")


def add_output(parser, suffix):
    """Adds `--output` and `--force`; see `output_path`."""
    parser.add_argument(
        "-o", "--output", metavar="PATH", help=f"where to write; FILE with {suffix} by default"
    )
    parser.add_argument("--force", action="store_true", help="overwrite the output if it exists")


def add_data(parser, required=True, what="x, and y if there are targets, or the inputs by name"):
    """Adds `--data`, `--samples` and `--batch-size`."""
    parser.add_argument(
        "--data", metavar="PATH", required=required, help=f".npy with inputs, or .npz with {what}"
    )
    parser.add_argument(
        "--samples",
        type=int,
        default=256,
        metavar="N",
        help="use the first N examples (%(default)s)",
    )
    parser.add_argument(
        "--batch-size", type=int, default=32, metavar="N", help="examples a batch (%(default)s)"
    )


def add_filters(parser):
    """Adds `--filters`."""
    parser.add_argument(
        "--filters",
        action="append",
        metavar="REGEX",
        help="only layers whose path matches; may be repeated",
    )


def add_precisions(parser, what):
    """Adds `--precisions`."""
    parser.add_argument(
        "--precisions",
        type=words,
        default=["ternary", "int4", "int8"],
        metavar="A,B,...",
        help=f"{what} (ternary,int4,int8)",
    )


def add_memory(parser):
    """Adds `--memory`."""
    parser.add_argument(
        "--memory",
        choices=("fastest", "smallest"),
        default="fastest",
        help="the layout kernels read best, or ternary weights in 1.6 bits (%(default)s)",
    )


def add_loss(parser):
    """Adds `--loss`."""
    parser.add_argument(
        "--loss", metavar="NAME", help="a Keras loss; that of the compiled model by default"
    )


def add_input_shape(parser):
    """Adds `--input-shape`."""
    parser.add_argument(
        "--input-shape",
        type=shape,
        metavar="A,B,...",
        help="shape of the inputs with the batch axis, for a model that takes any",
    )


def shape(text):
    """The sizes of a list with commas: the type of an argument, which `argparse` names."""
    return tuple(int(size) for size in text.split(","))


def words(text):
    """The words of a list with commas: the type of an argument.

    Raises:
        ValueError: There is none.
    """
    found = [word.strip() for word in text.split(",") if word.strip()]
    if not found:
        raise ValueError("an empty list")
    return found


def check_positive(arguments, *names):
    """Raises a `ValueError` unless these arguments are positive."""
    for name in names:
        if getattr(arguments, name) < 1:
            option = "--" + name.replace("_", "-")
            raise ValueError(f"{option} must be positive. Received: {getattr(arguments, name)}")


def verbosity(arguments):
    """`verbose` for a function that shows progress and its result: not beside JSON."""
    return 0 if arguments.json else 1


def output_path(arguments, suffix, accepted=()):
    """Where to write, checked before any work is done: `model.keras` gives `model.SUFFIX`,
    a folder `model-1.5B` `model-1.5B.SUFFIX` beside it.

    Args:
        arguments: Those of the command.
        suffix: Of the default.
        accepted: How the name may end, anyhow by default.

    Raises:
        FileExistsError: There is such a file, and no `--force`.
        FileNotFoundError: Its folder does not exist.
        ValueError: The name ends otherwise.
    """
    path = arguments.output or _beside(pathlib.Path(arguments.file), suffix)
    return checked_path(path, arguments.force, accepted)


def _beside(source, suffix):
    """A folder's name has no suffix to replace, whatever dots are in it: bitnet-b1.58-2B-4T."""
    if source.is_dir():
        source = source.resolve()
        return source.with_name(source.name + suffix)
    return source.with_suffix(suffix)


def checked_path(path, force, accepted=()):
    """As `output_path`, for a path that was given."""
    path = pathlib.Path(path)
    if accepted and path.suffix not in accepted:
        raise ValueError(f"The output must be named *{' or *'.join(accepted)}. Received: '{path}'")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"There is no folder '{path.parent}' to write '{path.name}' to.")
    if path.exists() and not force:
        raise FileExistsError(f"'{path}' exists already: give --force, or another --output.")
    return path


def load_model(path):
    """The model of a file.

    Raises:
        FileNotFoundError: There is none.
        ValueError: It is no model, or cannot be loaded.
    """
    import keras

    file = pathlib.Path(path)
    if not file.exists():
        raise FileNotFoundError(f"There is no file '{path}'.")
    if file.suffix == ".gguf" or (file.is_dir() and not (file / "model.weights.h5").exists()):
        raise ValueError(
            f"'{path}' is no .keras file. `keras-bitnet import` makes one of a checkpoint folder "
            "or a .gguf file."
        )
    try:
        return keras.models.load_model(path)
    except (ValueError, OSError):
        raise
    except Exception as error:  # whatever the layers of a foreign file raise
        reason = f"{type(error).__name__}: {error}"
        if "Could not locate class" in reason:  # of which Keras shows all of the config, twice
            reason = reason.rpartition("Exception encountered: ")[2].partition(". ")[0]
            reason += ". `--import MODULE` imports the module that registers it."
        raise ValueError(f"'{path}' cannot be loaded: {reason}") from error


def load_any(path, **arguments):
    """The model of a `.keras` file, a checkpoint folder or a `.gguf` file.

    Args:
        path: The file or folder.
        **arguments: Of `interop.from_hugging_face` or `interop.from_gguf`.
    """
    from keras_bitnet import interop

    if pathlib.Path(path).is_dir():
        return interop.from_hugging_face(path, **arguments)
    if pathlib.Path(path).suffix in (".keras", ".h5"):
        return load_model(path)
    return interop.from_gguf(path, **arguments)


def add_tokenizer(parser):
    """Adds `--tokenizer`; see `load_tokenizer`."""
    parser.add_argument(
        "--tokenizer", metavar="PATH", help="checkpoint folder, tokenizer.json or .gguf file"
    )


def load_tokenizer(path):
    """The tokenizer of a checkpoint folder, a `tokenizer.json` or a `.gguf` file; else `None`."""
    from keras_bitnet import interop

    if not path:
        return None
    is_gguf = pathlib.Path(path).suffix == ".gguf"
    return (interop.Tokenizer.from_gguf if is_gguf else interop.Tokenizer.from_folder)(path)


def save_model(model, path, force):
    """Writes a `.keras` file, whole or not at all."""
    with replacing(path, overwrite=force) as temporary:
        model.save(temporary)


def write_model(model, path, arguments):
    """Writes the model that a command made of FILE, and returns what it tells about it."""
    from keras_bitnet.report import summary

    save_model(model, path, arguments.force)
    totals = summary(model, as_data=True).totals
    return {
        "output": str(path),
        "bytes_before": pathlib.Path(arguments.file).stat().st_size,
        "bytes_after": path.stat().st_size,
        "bytes_in_memory": totals.bytes_stored,
        "bytes_packed": totals.bytes_packed,
    }


def changed_facts(changes):
    """The list of `Change` as dictionaries; paths name the layers."""
    return [
        {
            "layer": change.path,
            "was": change.layer,
            "is": change.replaced_by or change.layer,
            "kept": change.reason or "",
        }
        for change in changes
    ]


def check_data(model, data):
    """Raises a `ValueError` unless a model can be run on the first example of data."""
    from keras_bitnet.report.data import batches, check_fit

    check_fit(model, batches(data, samples=1))


def load_data(path, samples=None):
    """Inputs, and targets if there are any, of a .npy or .npz file.

    An .npz file holds `x`, or the inputs by name, and `y` where there are targets.

    Args:
        path: The file.
        samples: How many examples to keep, all by default.

    Returns:
        `(x, y)`; `x` is an array or a dictionary of arrays, `y` an array or `None`.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It holds no data, or arrays of different lengths.
    """
    import numpy as np

    path = pathlib.Path(path)
    if path.suffix not in (".npy", ".npz"):
        raise ValueError(f"Data is read from .npy or .npz files. Received: '{path}'")
    if samples is not None and samples < 1:
        raise ValueError(f"--samples must be positive. Received: {samples}")
    try:
        loaded = np.load(path)
        arrays = {"x": loaded} if path.suffix == ".npy" else {name: loaded[name] for name in loaded}
    except (ValueError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"'{path}' holds no arrays that can be read: {error}") from error
    lengths = {name: len(array) if array.ndim else 0 for name, array in arrays.items()}
    if len(set(lengths.values())) != 1 or 0 in lengths.values():
        raise ValueError(
            f"'{path}' must hold arrays with one row an example, as many in each. "
            f"Received: {lengths}"
        )
    arrays = {name: array[:samples] for name, array in arrays.items()}
    targets = arrays.pop("y", None)
    if not arrays:
        raise ValueError(f"'{path}' holds targets and no inputs. Received: {list(lengths)}")
    return (arrays["x"] if list(arrays) == ["x"] else arrays), targets
