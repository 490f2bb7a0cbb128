"""What a packed call costs beside the product itself: time of the framework, memory.

    KERAS_BACKEND=torch python benchmarks/call_costs.py

*Time*: one row through a packed layer of 256x256 in memory that is cached, by the public
`keras_bitnet.ops.bit_matmul` on one thread, less the bare C call in the same run. PyTorch runs it
eagerly in inference mode. Of JAX and TensorFlow it is what a product adds to a compiled function,
by the difference of two with 64 and 192 of them in a row: to call any function of TensorFlow takes
hundreds of microseconds. Whole eager calls of the layer and of a `Dense` of its size, too.

*Memory*: what packed layers of 4096 inputs and 14336 outputs add to the resident memory of a
process whose framework is warm, before their first call and after it.
"""

import argparse
import ctypes
import functools
import gc
import os
import pathlib
import statistics
import sys

# One thread, before any framework starts.
os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:1])
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
sys.path.insert(0, str(pathlib.Path(__file__).parent))

import common
import keras
import numpy as np

from keras_bitnet import ops
from keras_bitnet.kernels import native
from keras_bitnet.layers import BitLinear

BACKEND = keras.backend.backend()
SIZE, SHORT, LONG = 256, 64, 192  # of a product; products in a row
PRODUCTS, CALLS = 2048, 256  # in one sample
IN, OUT = 4096, 14336
LATER = 4


def packed_layer(in_features, out_features):
    """A packed ternary layer without bias, with random codes."""
    layer = BitLinear(out_features, use_bias=False, packed=True)
    layer.build((None, in_features))
    tiles = np.random.default_rng(0).integers(0, 3, tuple(layer.kernel_tiles.shape), np.uint8)
    layer.kernel_tiles.assign(tiles * 0x15)  # three codes 0, 1 or 2 in a byte
    layer.kernel_scale.assign(np.ones(tuple(layer.kernel_scale.shape), np.float32))
    return layer


def bare_call(layer, x):
    """The C call on memory of NumPy, and the array that it writes to."""
    packed, out = layer.packed_kernel, np.empty((1, SIZE), np.float32)
    tiles, scale = (keras.ops.convert_to_numpy(v).copy() for v in (packed.tiles, packed.scale))
    problem = native.MatmulStruct(
        rows=1, in_features=SIZE, out_features=SIZE, bits=packed.bits, dtype=0, activation_bits=8,
        offset=packed.offset, epsilon=layer.activation_quantizer.epsilon,
        scale_columns=scale.shape[1], x=x.ctypes.data, tiles=tiles.ctypes.data,
        scale=scale.ctypes.data, y=out.ctypes.data,
    )  # fmt: skip
    run, address, alive = native.library().kbn_run, ctypes.byref(problem), (problem, tiles, scale)

    def call():
        if run(address, None):
            raise SystemExit(f"The C call failed on {alive}")

    return call, out


def framework_calls(layer, x):
    """`({products in a row: call}, result of one product)` through the public operator."""
    packed, quantizer = layer.packed_kernel, layer.activation_quantizer
    x = keras.ops.convert_to_tensor(x)

    def product(x):
        return ops.bit_matmul(x, packed, quantizer)

    if BACKEND == "torch":
        return {1: lambda: product(x)}, product(x)

    def chain(x, length):
        for _ in range(length):
            x = product(x)
        return x

    def compiled(length):
        if BACKEND == "jax":
            import jax

            run = jax.jit(functools.partial(chain, length=length))
            return lambda: run(x).block_until_ready()
        import tensorflow as tf

        run = tf.function(functools.partial(chain, length=length))
        return lambda: run(x)

    return {length: compiled(length) for length in (SHORT, LONG)}, product(x)


def layer_calls(layer, x):
    """Eager calls of the layer and its float rival: `{name: (call, calls in a sample)}`."""
    dense, x = keras.layers.Dense(SIZE, use_bias=False), keras.ops.convert_to_tensor(x)
    dense.build((None, SIZE))

    def eager(layer):
        if BACKEND == "jax":
            return lambda: layer(x).block_until_ready()
        return lambda: layer(x)

    return {"layer": (eager(layer), CALLS), "dense": (eager(dense), CALLS)}


def added_time(repeats):
    """Microseconds of a product: bare, through the framework, what that adds; of layers."""
    x = np.random.default_rng(1).standard_normal((1, SIZE)).astype("float32")
    layer = packed_layer(SIZE, SIZE)
    bare, out = bare_call(layer, x)
    bare()
    calls, result = framework_calls(layer, x)
    np.testing.assert_array_equal(keras.ops.convert_to_numpy(result), out)
    loops = {
        "bare": (bare, PRODUCTS),
        **{length: (call, PRODUCTS // length) for length, call in calls.items()},
        **layer_calls(layer, x),
    }

    def timed(function, count):
        def loop():
            for _ in range(count):
                function()

        return loop

    times = common.interleaved_times(
        {name: timed(*loop) for name, loop in loops.items()}, repeats, warmup=5
    )
    medians = {
        name: statistics.median(samples) / loops[name][1] * 1e6 for name, samples in times.items()
    }
    lengths = sorted(calls)
    row = medians.pop(lengths[-1])
    if len(lengths) == 2:
        row = (row - medians.pop(SHORT)) / (LONG - SHORT)
    found = {f"{name}_microseconds": median for name, median in medians.items()}
    added = row - found["bare_microseconds"]
    return {**found, "framework_microseconds": row, "added_microseconds": added}


def resident():
    """Bytes of this process that are in memory, less what the C library holds back for later."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return common.memory("VmRSS")


def added_memory():
    """Resident bytes that packed layers add, as ratios to their packed bytes.

    The first layer pays for what is compiled for its shape, and for a buffer of its initial zeros
    where the framework keeps it for the next variable; a later layer is one of four more.
    """
    x = keras.ops.ones((1, IN))
    keras.ops.convert_to_numpy(packed_layer(IN, 16)(x))
    layers, found = [], [resident()]
    for _ in range(1 + LATER):
        layers.append(packed_layer(IN, OUT))
        found.append(resident())
        keras.ops.convert_to_numpy(layers[-1](x))
        found.append(resident())
    packed_bytes = layers[0].packed_kernel.nbytes
    start, built, called = ((value - found[0]) / packed_bytes for value in found[:3])
    return {
        "packed_bytes": packed_bytes,
        "first_layer_built": built - start,
        "first_layer_called": called - start,
        "later_layer_built": (found[-2] - found[2]) / (LATER * packed_bytes),
        "later_layer_called": (found[-1] - found[2]) / (LATER * packed_bytes),
    }


def main():
    """Measures both, writes `results/call_costs_<backend>.json`, prints them."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--repeats", type=int, default=101)
    parser.add_argument(
        "--output", default=common.RESULTS / f"call_costs_{BACKEND}.json", type=pathlib.Path
    )
    arguments = parser.parse_args()
    native.set_threads(1)
    with common.inference():
        found = {"memory": added_memory(), "time": added_time(arguments.repeats)}
    common.write_json(arguments.output, {**common.header(repeats=arguments.repeats), **found})
    for values in found.values():
        print("  ".join(f"{name} {value:.4g}" for name, value in values.items()))


if __name__ == "__main__":
    main()
