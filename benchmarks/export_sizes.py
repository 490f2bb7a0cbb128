"""How large the files of a packed model are, and how far their outputs are from it.

One model, every format of the present backend, and the time of one row on one thread.
Outputs are checked before a size is written; a format that fails is written with its reason.

    KERAS_BACKEND=torch python benchmarks/export_sizes.py
"""

import argparse
import json
import os
import pathlib
import tempfile

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
from common import RESULTS, header, interleaved_times, markdown, spread, write_json

import keras_bitnet
from keras_bitnet.kernels import use_kernel
from keras_bitnet.layers import BitLinear

INPUTS, WIDTH, LAYERS = 512, 2048, 3


def make_model(weights):
    layers = [
        BitLinear(WIDTH, weight_quantizer=weights, activation="relu", norm="rms")
        for _ in range(LAYERS)
    ]
    model = keras.Sequential([keras.Input((INPUTS,)), *layers])
    return keras_bitnet.pack_model(model, verbose=0)


def onnx_session(path):
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def to_onnx(model, path):
    keras_bitnet.interop.to_onnx(model, path)
    session = onnx_session(path)
    name = session.get_inputs()[0].name
    return lambda x: session.run(None, {name: x})[0]


def keras_format(form):
    def export(model, path):
        with use_kernel("reference"):
            model.export(str(path), format=form, verbose=False)
        return LOADERS[form](path)

    return export


def load_saved_model(path):
    import tensorflow as tf

    serve = tf.saved_model.load(str(path)).serve
    return lambda x: serve(tf.constant(x)).numpy()


def load_litert(path):
    import tensorflow as tf

    run = tf.lite.Interpreter(str(path), num_threads=1).get_signature_runner()
    (name,) = run.get_input_details()
    return lambda x: next(iter(run(**{name: x}).values()))


def load_openvino(path):
    import openvino

    compiled = openvino.Core().compile_model(path, "CPU", {"INFERENCE_NUM_THREADS": 1})
    return lambda x: compiled(x)[0]


def load_torch(path):
    import torch

    run = torch.export.load(str(path)).module()
    return lambda x: run(torch.from_numpy(x)).detach().numpy()


LOADERS = {
    "tf_saved_model": load_saved_model, "litert": load_litert, "openvino": load_openvino,
    "torch": load_torch,
}  # fmt: skip
FORMATS = {
    "to_onnx": (".onnx", to_onnx, ("torch",)),
    "tf_saved_model": ("", keras_format("tf_saved_model"), ("tensorflow", "jax")),
    "litert": (".tflite", keras_format("litert"), ("tensorflow",)),
    "openvino": (".xml", keras_format("openvino"), ("tensorflow", "jax", "torch")),
    "torch": (".pt2", keras_format("torch"), ("torch",)),
}


def size(folder):
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def measure(name, model, x, repeats):
    suffix, export, _ = FORMATS[name]
    expected = keras.ops.convert_to_numpy(model(x))
    with tempfile.TemporaryDirectory() as folder:
        try:
            run = export(model, pathlib.Path(folder, f"model{suffix}"))
            error = float(np.abs(run(x) - expected).mean() / np.abs(expected).mean())
        except Exception as failure:  # whatever a converter raises is the result
            lines = [line for line in str(failure).strip().splitlines() if line.strip()]
            return {"failed": f"{type(failure).__name__}: {lines[-1][:200] if lines else ''}"}
        if error > 1e-3:
            return {"failed": f"outputs differ by {error:.2g}"}
        times = interleaved_times({"run": lambda: run(x)}, repeats)["run"]
        return {"bytes": size(pathlib.Path(folder)), "mean_error": error, "seconds": spread(times)}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--output", type=pathlib.Path)
    arguments = parser.parse_args()
    backend = keras.backend.backend()
    x = np.random.default_rng(0).normal(size=(1, INPUTS)).astype("float32")
    rows = []
    for weights in ("ternary", "int4"):
        keras.utils.set_random_seed(0)
        model = make_model(weights)
        floats = 4 * sum(layer.in_features * layer.out_features for layer in model.layers)
        with tempfile.TemporaryDirectory() as folder:
            model.save(pathlib.Path(folder, "model.keras"))
            row = {"weights": weights, "format": ".keras", "bytes": size(pathlib.Path(folder))}
        rows.append({**row, "float_bytes": floats})
        for name, (_, _, backends) in FORMATS.items():
            if backend in backends:
                found = measure(name, model, x, arguments.repeats)
                rows.append({"weights": weights, "format": name, "float_bytes": floats, **found})
                print(json.dumps(rows[-1]), flush=True)
    path = arguments.output or RESULTS / f"export_sizes_{backend}.json"
    settings = {"inputs": INPUTS, "width": WIDTH, "layers": LAYERS, "rows": 1, "threads": 1}
    write_json(path, {**header(**settings), "results": rows})
    cells = [[r["weights"], r["format"], r.get("bytes", "-"),
              f"{r['bytes'] / r['float_bytes']:.3f}" if "bytes" in r else r["failed"]]
             for r in rows]  # fmt: skip
    print(markdown(["weights", "format", "bytes", "share of float32"], cells))


if __name__ == "__main__":
    main()
