"""One product in ONNX Runtime, in the ways that an exported model could hold it.

`guarded` is what `keras_bitnet.interop.to_onnx` writes. Every way is compared with int64 sums of
the same integers first: its error is written beside its time. One thread.

    python benchmarks/onnx_products.py
"""

import argparse
import os
import pathlib

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import numpy as np
import onnxruntime
from common import RESULTS, header, interleaved_times, markdown, spread, write_json
from onnx import TensorProto, helper, numpy_helper

from keras_bitnet.interop.codecs.matmul_nbits import pack_blocks

BLOCK = 128


def graph(nodes, arrays, inputs, outputs):
    shapes = {"x": inputs, "y": outputs}
    x, y = (
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["m", n])
        for name, n in shapes.items()
    )
    weights = [numpy_helper.from_array(array, name) for name, array in arrays.items()]
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    made = helper.make_graph(nodes, "product", [x], [y], weights)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    model = helper.make_model(made, opset_imports=opsets, ir_version=10).SerializeToString()
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def n_bits(levels, bits, accuracy_level, guards):
    """`MatMulNBits` of levels `(out, in)`, with a place for 127 in every block or without."""
    outputs, inputs = levels.shape
    taken = BLOCK - guards
    count = -(-inputs // taken)
    blocks = np.zeros((outputs, count, BLOCK), np.int16)
    blocks[..., :taken] = np.pad(levels, ((0, 0), (0, count * taken - inputs))).reshape(
        outputs, count, taken
    )
    arrays = {"b": pack_blocks(blocks, bits), "s": np.ones((outputs, count), np.float32)}
    node = helper.make_node(
        "MatMulNBits", ["x", "b", "s"], ["y"], domain="com.microsoft", K=count * BLOCK, N=outputs,
        bits=bits, block_size=BLOCK, accuracy_level=accuracy_level,
    )  # fmt: skip
    session = graph([node], arrays, count * BLOCK, outputs)

    def run(x):
        padded = np.full((len(x), count, BLOCK), 127.0, np.float32)
        padded[..., :taken] = np.pad(x, ((0, 0), (0, count * taken - inputs))).reshape(
            len(x), count, taken
        )
        feed = {"x": padded.reshape(len(x), -1)}
        return lambda: session.run(None, feed)[0]

    return run


def integer(levels):
    """`MatMulInteger` of 8-bit levels."""
    nodes = [
        helper.make_node("Cast", ["x"], ["codes"], to=TensorProto.INT8),
        helper.make_node("MatMulInteger", ["codes", "b"], ["sums"]),
        helper.make_node("Cast", ["sums"], ["y"], to=TensorProto.FLOAT),
    ]
    arrays = {"b": np.ascontiguousarray(levels.T.astype(np.int8))}
    session = graph(nodes, arrays, levels.shape[1], levels.shape[0])
    return lambda x: lambda: session.run(None, {"x": x})[0]


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=int, default=2048)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--output", type=pathlib.Path, default=RESULTS / "onnx_products.json")
    arguments = parser.parse_args()
    random, n = np.random.default_rng(0), arguments.size
    results = []
    for bits in (2, 4, 8):
        levels = random.integers(-(2 ** (bits - 1)), 2 ** (bits - 1), (n, n))
        ways = {
            "guarded, level 4": n_bits(levels, bits, 4, 1),
            "level 4": n_bits(levels, bits, 4, 0),
            "level 0": n_bits(levels, bits, 0, 0),
            "MatMulInteger": integer(levels),
        }
        for rows in (1, 64):
            x = random.integers(-127, 128, (rows, n)).astype(np.float32)
            expected = x.astype(np.int64) @ levels.T
            runs = {name: way(x) for name, way in ways.items()}
            errors = {name: np.abs(run() - expected).max() for name, run in runs.items()}
            times = interleaved_times(runs, arguments.repeats)
            for name in ways:
                error = float(errors[name] / np.abs(expected).max())
                results.append({"bits": bits, "rows": rows, "way": name, "largest_error": error,
                                "seconds": spread(times[name])})  # fmt: skip
    settings = {"size": n, "block": BLOCK, "onnxruntime": onnxruntime.__version__}
    write_json(arguments.output, {**header(**settings), "results": results})
    cells = [[r["bits"], r["rows"], r["way"], f"{r['largest_error']:.2g}",
              f"{1e3 * r['seconds']['median']:.3f}"] for r in results]  # fmt: skip
    print(markdown(["bits", "rows", "way", "largest error", "ms"], cells))


if __name__ == "__main__":
    main()
