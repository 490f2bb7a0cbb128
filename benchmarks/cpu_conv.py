"""Times packed convolutions on this CPU: the public layer beside what it replaces.

    KERAS_BACKEND=jax python benchmarks/cpu_conv.py [--threads 2] [--bits 2]

One interleaved run of `BitConv2D`, packed, ternary by default, with activations of 8 bits; the same
with patches that the backend makes; float32 `Conv2D` of the same backend; and ONNX Runtime's
convolution of int8 weights and statically quantized 8-bit activations, where `onnx` and
`onnxruntime` are installed. Results are checked before anything is timed. Writes
`results/cpu_conv_<backend>.json`.
"""

import argparse
import os
import pathlib
import statistics
import sys
import time

os.environ.setdefault("KERAS_BACKEND", "jax")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
sys.path.insert(0, str(pathlib.Path(__file__).parent))


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--bits", type=int, choices=(1, 2, 4, 8), default=2, help="2: ternary")
    parser.add_argument("--repeats", type=int, default=101)
    parser.add_argument("--output", help="JSON file, results/cpu_conv_<backend>.json by default")
    return parser.parse_args()


ARGS = arguments()
os.environ["OMP_NUM_THREADS"] = os.environ["TF_NUM_INTRAOP_THREADS"] = str(ARGS.threads)

import common
import keras
import numpy as np
from keras import ops
from layer_choices import inference, tensor

from keras_bitnet import pack_model
from keras_bitnet.kernels import native
from keras_bitnet.layers import BitConv2D

BACKEND = keras.backend.backend()
WEIGHTS = {1: "binary", 2: "ternary", 4: "int4", 8: "int8"}
# batch, height and width, channels, filters, kernel, stride: those of a ResNet
CASES = [
    (1, 224, 3, 64, 7, 2),
    (1, 56, 64, 64, 3, 1),
    (1, 28, 128, 128, 3, 1),
    (1, 14, 256, 256, 3, 1),
    (1, 7, 512, 512, 3, 1),
    (1, 56, 256, 64, 1, 1),
    (8, 28, 128, 128, 3, 1),
    (8, 14, 256, 256, 3, 1),
]


def onnx_int8(x, kernel, stride, wanted):
    """ONNX Runtime's convolution of codes, its inputs and outputs float; weights per channel."""
    onnx, runtime = common.peer("onnx"), common.peer("onnxruntime")
    x, wanted = (np.moveaxis(ops.convert_to_numpy(v), -1, 1) for v in (x, wanted))
    kernel = np.transpose(kernel, (3, 2, 0, 1))
    w_scale = np.abs(kernel).max(axis=(1, 2, 3)) / 127
    codes = np.rint(kernel / w_scale[:, None, None, None]).astype(np.int8)
    constants = {
        "xs": np.float32(np.abs(x).max() / 127), "xz": np.uint8(128), "w": codes,
        "ws": w_scale.astype(np.float32), "wz": np.zeros(len(codes), np.int8),
        "ys": np.float32(np.abs(wanted).max() / 127), "yz": np.uint8(128),
    }  # fmt: skip
    node = onnx.helper.make_node
    same = {"auto_pad": "SAME_UPPER", "strides": [stride, stride]}
    nodes = [
        node("QuantizeLinear", ["x", "xs", "xz"], ["q"]),
        node("QLinearConv", ["q", "xs", "xz", "w", "ws", "wz", "ys", "yz"], ["p"], **same),
        node("DequantizeLinear", ["p", "ys", "yz"], ["y"]),
    ]
    floats = [
        onnx.helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, v.shape)
        for n, v in (("x", x), ("y", wanted))
    ]
    tensors = [onnx.numpy_helper.from_array(np.asarray(v), n) for n, v in constants.items()]
    graph = onnx.helper.make_graph(nodes, "conv", floats[:1], floats[1:], tensors)
    opset = [onnx.helper.make_opsetid("", 17)]
    model = onnx.helper.make_model(graph, opset_imports=opset, ir_version=8)
    options = runtime.SessionOptions()
    options.intra_op_num_threads = ARGS.threads
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # the others run next
    session = runtime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    (y,) = session.run(None, {"x": x})
    assert np.linalg.norm(y - wanted) < 0.05 * np.linalg.norm(wanted)
    return lambda: session.run(None, {"x": x})


def case(rng, batch, size, channels, filters, kernel, stride):
    """Times of one layer."""
    x = tensor(rng, batch, size, size, channels)
    stock = keras.layers.Conv2D(filters, kernel, stride, padding="same")
    layer = BitConv2D(filters, kernel, stride, padding="same", weight_quantizer=WEIGHTS[ARGS.bits])
    wanted, y = stock(x), layer(x)
    model = keras.Sequential([keras.Input(x.shape[1:]), layer])
    packed = pack_model(model, verbose=0).layers[0]
    difference = ops.convert_to_numpy(packed(x) - y)
    assert np.linalg.norm(difference) < 1e-4 * np.linalg.norm(ops.convert_to_numpy(y))
    runs = {
        "packed": inference(packed, x),
        "patches": inference(lambda v: packed.product(packed.patches(v), packed.bias), x),
        "float32": inference(stock, x),
    }
    skipped = {}
    try:
        weights = ops.convert_to_numpy(stock.kernel)
        runs["onnxruntime int8"] = onnx_int8(x, weights, stride, wanted)
    except common.Skip as reason:
        skipped["onnxruntime int8"] = str(reason)
    times = common.interleaved_times(runs, ARGS.repeats, warmup=5)
    median = {name: statistics.median(values) for name, values in times.items()}
    macs = batch * (-(-size // stride)) ** 2 * kernel**2 * channels * filters
    return {
        "batch": batch, "size": size, "channels": channels, "filters": filters, "kernel": kernel,
        "stride": stride, "bytes": packed.packed_kernel.nbytes,
        "float_bytes": 4 * kernel**2 * channels * filters,
        "gmacs": macs / median["packed"] / 1e9, "skipped": skipped,
        "seconds": {name: common.spread(values) for name, values in times.items()},
        "faster_than": {
            name: statistics.median(
                [a / b for a, b in zip(values, times["packed"], strict=True)]
            )
            for name, values in times.items() if name != "packed"
        },
    }  # fmt: skip


def table(rows):
    """The results in Markdown: times faster than each of the others."""
    names = list(rows[0]["faster_than"])
    cells = [
        [
            f"{r['batch']} x {r['size']}x{r['size']}x{r['channels']}",
            f"{r['kernel']}x{r['kernel']}/{r['stride']}, {r['filters']}",
            f"{1e3 * r['seconds']['packed']['median']:.2f}",
            f"{r['gmacs']:.0f}",
            *(f"{r['faster_than'][name]:.1f}" for name in names),
        ]
        for r in rows
    ]
    return common.markdown(["inputs", "layer", "ms", "GMAC/s", *names], cells)


def main():
    """Measures all cases, writes the results and prints a table."""
    if BACKEND == "torch":
        import torch

        torch.set_num_threads(ARGS.threads)
    native.set_threads(ARGS.threads)
    start, rng = time.perf_counter(), np.random.default_rng(0)
    rows = [case(rng, *numbers) for numbers in CASES]
    path = ARGS.output or common.RESULTS / f"cpu_conv_{BACKEND}.json"
    settings = {"threads": ARGS.threads, "bits": ARGS.bits, "isa": native.isa()}
    common.publish(path, settings, start, rows, table)


if __name__ == "__main__":
    main()
