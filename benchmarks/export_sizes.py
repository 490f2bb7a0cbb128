"""How large a packed language model is in every format that it is exported to.

    python benchmarks/export_sizes.py

The model is that of `examples/language_model.py` with random weights: its blocks ternary, its small
table of characters float. Each format is written by a process with the backend that it takes, from
the same `.keras` file. The bits are those of the file over the weights of the blocks, so they count
what else is in it: the table, the norms, the graph. Writes `results/export_sizes.json`.
"""

import argparse
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time
import warnings

os.environ.setdefault("KERAS_BACKEND", "torch")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
HERE = pathlib.Path(__file__).parent
sys.path[:0] = [str(HERE.parent / "examples"), str(HERE)]

import common
import keras
from language_model import SIZE, make_model

import keras_bitnet
from keras_bitnet.interop import to_gguf, to_hugging_face, to_onnx
from keras_bitnet.kernels import use_kernel
from keras_bitnet.layers.base import BitLayer

CHARACTERS = 95


def gguf(kind):
    """A function that writes a GGUF file of a type."""
    return lambda model, path: to_gguf(model, path, type=kind)


def keras_export(kind):
    """A function that exports in a format of Keras, traced with the reference kernel."""

    def export(model, path):
        tokens = {
            name: keras.InputSpec(shape=(1, 32), dtype="int32", name=name)
            for name in ("token_ids", "padding_mask")
        }
        with use_kernel("reference"):
            model.export(str(path), format=kind, input_signature=[tokens], verbose=False)

    return export


# (backend, name of the file, function of model and path)
ROUTES = {
    "Keras": ("torch", "model.keras", lambda model, path: model.save(path)),
    "GGUF, tq1_0": ("torch", "tq1.gguf", gguf("tq1_0")),
    "GGUF, tq2_0": ("torch", "tq2.gguf", gguf("tq2_0")),
    "GGUF, q2_0": ("torch", "q2.gguf", gguf("q2_0")),
    "GGUF, f16": ("torch", "f16.gguf", gguf("f16")),
    "Hugging Face, offline": ("torch", "offline", to_hugging_face),
    "Hugging Face, float": (
        "torch", "float", lambda model, path: to_hugging_face(model, path, variant="float"),
    ),
    "ONNX": ("torch", "model.onnx", to_onnx),
    "torch.export": ("torch", "model.pt2", keras_export("torch")),
    "TensorFlow SavedModel": ("tensorflow", "saved_model", keras_export("tf_saved_model")),
    "LiteRT": ("tensorflow", "model.tflite", keras_export("litert")),
}  # fmt: skip


def write(source, folder, route):
    """Exports the model; a row of the result."""
    backend, name, function = ROUTES[route]
    path = pathlib.Path(folder, name)
    model = keras.models.load_model(source)
    weights = sum(
        layer.in_features * layer.out_features
        for layer in model._flatten_layers()
        if isinstance(layer, BitLayer)
    )
    row = {"route": route, "backend": backend, "block_weights": weights}
    try:
        function(model, path)
    except Exception as error:  # whatever an exporter raises is the finding
        return {**row, "error": f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"}
    size = sum(f.stat().st_size for f in (path.rglob("*") if path.is_dir() else [path]))
    return {**row, "bytes": size, "bits_per_block_weight": 8 * size / weights}


def measure(folder):
    """The rows, each written by a process of its own."""
    source, rows = pathlib.Path(folder, "source.keras"), []
    keras.utils.set_random_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it was not trained
        keras_bitnet.pack_model(make_model(CHARACTERS, SIZE), verbose=0).save(source)
    for route, (backend, _, _) in ROUTES.items():
        with tempfile.NamedTemporaryFile("r", suffix=".json") as file:
            command = [sys.executable, __file__, "--route", route, "--source", source]
            command += ["--folder", folder, "--output", file.name]
            environment = {**os.environ, "KERAS_BACKEND": backend}
            subprocess.run(command, env=environment, check=True)
            rows.append(json.load(file))
        print(rows[-1], flush=True)
    return rows


def table(rows):
    """The results as Markdown."""
    cells = [
        (row["route"], row["backend"], f"{row['bytes'] / 1e6:.2f}",
         f"{row['bits_per_block_weight']:.2f}")
        if "bytes" in row else (row["route"], row["backend"], row["error"], "")
        for row in rows
    ]  # fmt: skip
    heads = ("Format", "written on", "MB", "bits of the file a weight of the blocks")
    return common.markdown(heads, cells)


def main():
    """Writes every format, then the JSON file, and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", default=common.RESULTS / "export_sizes.json")
    for name in ("route", "source", "folder"):
        parser.add_argument(f"--{name}", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.route:
        row = write(arguments.source, arguments.folder, arguments.route)
        pathlib.Path(arguments.output).write_text(json.dumps(row))
        return
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        rows = measure(folder)
    settings = {"size": SIZE, "characters": CHARACTERS}
    common.publish(arguments.output, settings, start, rows, table)


if __name__ == "__main__":
    main()
