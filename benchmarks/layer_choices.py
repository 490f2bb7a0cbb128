"""Choices in the layers that rest on time, measured on this CPU.

*Norm.* A packed layer with a norm before its product has a kernel that can normalize the rows that
it quantizes. Beside it the same norm as an operation before the product, and no norm.

*Patches.* A convolution with quantized activations multiplies patches. With float activations
it could be a convolution of the backend; forward and backward of both are compared.

*Lookup.* A packed embedding gathers bytes and unpacks them; a float one gathers floats.

    KERAS_BACKEND=jax python benchmarks/layer_choices.py
"""

import argparse
import os
import pathlib
import statistics
import sys

os.environ.setdefault("KERAS_BACKEND", "jax")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
sys.path.insert(0, str(pathlib.Path(__file__).parent))

import common
import keras
import numpy as np
from keras import ops

from keras_bitnet import pack_model
from keras_bitnet.layers import BitConv2D, BitEmbedding, BitLinear

NORM_CASES = [
    (1, 2560, 2560),
    (64, 2560, 2560),
    (1, 2560, 6912),
    (64, 2560, 6912),
    (512, 1024, 1024),
]
CONV_CASES = [(32, 28, 16, 32, 3), (32, 14, 64, 64, 3), (8, 56, 32, 32, 3), (32, 14, 64, 128, 1)]
LOOKUP_CASES = [(1, 32000, 2048), (512, 32000, 2048), (512, 32000, 384)]


def compiled(function):
    """The function compiled where the backend compiles, waiting for the result."""
    backend = keras.backend.backend()
    if backend == "jax":
        import jax

        function = jax.jit(function)
        return lambda *args: jax.block_until_ready(function(*args))
    if backend == "tensorflow":
        import tensorflow as tf

        return tf.function(function)
    return function


def gradient_of(loss):
    """The function that gives the gradients of a scalar with respect to all arguments."""
    backend = keras.backend.backend()
    if backend == "jax":
        import jax

        return compiled(jax.grad(loss, (0, 1)))
    if backend == "tensorflow":
        import tensorflow as tf

        @tf.function
        def run(*args):
            with tf.GradientTape() as tape:
                tape.watch(args)
                value = loss(*args)
            return tape.gradient(value, args)

        return run

    def run(*args):
        args = [a.detach().requires_grad_(True) for a in args]
        loss(*args).backward()
        return [a.grad for a in args]

    return run


def tensor(rng, *shape):
    """A tensor of normal numbers."""
    return ops.convert_to_tensor(rng.normal(size=shape).astype("float32"))


def inference(layer, x):
    """A layer, or what it computes, as a compiled function of these inputs."""
    function = compiled(layer)
    if keras.backend.backend() != "torch":
        return lambda: function(x)
    import torch

    def run():
        with torch.no_grad():
            return function(x)

    return run


def norm_case(rng, rows, in_features, units, repeats):
    """Packed layers: a norm within the product, one before it, and none."""
    x, packed = tensor(rng, rows, in_features), {}
    for norm in (None, "rms"):
        model = keras.Sequential([keras.Input((in_features,)), BitLinear(units, norm=norm)])
        packed[norm] = pack_model(model, verbose=0).layers[0]
    plain, within = packed[None].call, packed["rms"].call
    normalize = packed["rms"].normalization.call
    functions = {"plain": plain, "within": within, "apart": lambda x: plain(normalize(x))}
    runs = {name: inference(function, x) for name, function in functions.items()}
    case = {"rows": rows, "in": in_features, "out": units}
    return {**case, **ratio(runs, "within", "apart", repeats)}


def conv_case(rng, batch, size, channels, filters, kernel, repeats):
    """Gradients through patches and a product, and through the convolution of the backend."""
    layer = BitConv2D(filters, kernel, padding="same", use_bias=False, activation_quantizer=None)
    x, ahead = tensor(rng, batch, size, size, channels), tensor(rng, batch, size, size, filters)
    layer.build(x.shape)
    weight = ops.convert_to_tensor(ops.convert_to_numpy(layer.kernel))

    def quantized(w):
        return layer.weight_quantizer.fake_quantize(layer.kernel_to_matrix(w))

    def patches(x, w):
        return ops.sum(ops.matmul(layer.patches(x), quantized(w)) * ahead)

    def conv(x, w):
        kernel = layer.matrix_to_kernel(quantized(w))
        return ops.sum(ops.conv(x, kernel, padding="same") * ahead)

    functions = {"patches": gradient_of(patches), "conv": gradient_of(conv)}
    results = [[ops.convert_to_numpy(g) for g in f(x, weight)] for f in functions.values()]
    for a, b in zip(*results, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3 * np.abs(b).max())
    runs = {name: lambda f=f: f(x, weight) for name, f in functions.items()}
    case = {"batch": batch, "size": size, "channels": channels, "filters": filters,
            "kernel": kernel}  # fmt: skip
    return {**case, **ratio(runs, "patches", "conv", repeats)}


def lookup_case(rng, tokens, vocabulary, features, repeats):
    """Lookups in a float table and in a packed ternary one."""
    layer = BitEmbedding(vocabulary, features)
    model = keras.Sequential([keras.Input((tokens,), dtype="int32"), layer])
    packed = pack_model(model, verbose=0).layers[0]
    stock = keras.layers.Embedding(vocabulary, features)
    ids = ops.convert_to_tensor(rng.integers(0, vocabulary, (1, tokens)).astype("int32"))
    np.testing.assert_allclose(
        ops.convert_to_numpy(packed(ids)), ops.convert_to_numpy(layer(ids)), rtol=1e-6
    )
    stock(ids)
    runs = {"packed": inference(packed, ids), "float": inference(stock, ids)}
    case = {"tokens": tokens, "vocabulary": vocabulary, "features": features}
    return {**case, "bytes": packed.packed_kernel.nbytes,
            **ratio(runs, "packed", "float", repeats)}  # fmt: skip


def ratio(runs, name, base, repeats):
    """Times functions in turns: seconds of all, and the median of the ratios of two.

    `repeats` turns, or as many more as fit into a second: calls of microseconds scatter most.
    """
    trial = common.interleaved_times(runs, repeats=3, warmup=3)
    fit = int(1 / sum(map(min, trial.values())))
    times = common.interleaved_times(runs, repeats=min(max(repeats, fit), 2001))
    ratios = [a / b for a, b in zip(times[name], times[base], strict=True)]
    seconds = {f"{key}_seconds": common.spread(values) for key, values in times.items()}
    return {**seconds, "ratio": statistics.median(ratios)}


def main():
    """Measures all choices, writes `results/layer_choices_<backend>.json`, prints tables."""
    backend = keras.backend.backend()
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", default=common.RESULTS / f"layer_choices_{backend}.json")
    parser.add_argument("--repeats", type=int, default=21)
    arguments = parser.parse_args()
    rng, repeats = np.random.default_rng(0), arguments.repeats
    results = {
        "norm": [norm_case(rng, *case, repeats) for case in NORM_CASES],
        "patches": [conv_case(rng, *case, repeats) for case in CONV_CASES],
        "lookup": [lookup_case(rng, *case, repeats) for case in LOOKUP_CASES],
    }
    common.write_json(arguments.output, {**common.header(repeats=repeats), "results": results})
    for name, rows in results.items():
        keys = [k for k in rows[0] if not k.endswith("_seconds")]
        cells = [[round(r[k], 3) if k == "ratio" else r[k] for k in keys] for r in rows]
        print(f"\n{name}\n" + common.markdown(keys, cells))


if __name__ == "__main__":
    main()
