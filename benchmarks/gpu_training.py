"""What forward and backward of a quantization-aware layer cost on a GPU beside a bfloat16 layer.

    KERAS_BACKEND=torch|jax python benchmarks/gpu_training.py

`BitLinear` W1.58A8 without a norm against `Dense`, 8192 tokens, policy mixed_bfloat16: the product,
the gradients of inputs and kernel, no optimizer, several steps at a time. On torch both eager and
compiled by `torch.compile`, on JAX under `jax.jit`. Candidates take turns; the table holds medians.
Writes `results/gpu_training_<backend>.json`.
"""

import argparse
import functools
import pathlib
import sys
import time

sys.path.insert(0, str(pathlib.Path(__file__).parent))

import common
import keras
import numpy as np

from keras_bitnet.layers import BitLinear

BACKEND = keras.backend.backend()
TOKENS = 8192
SHAPES = ((4096, 14336), (4096, 4096))  # in, out
REPEATS = 15
STEPS = 4  # one after another, as in training: the host runs ahead of the GPU


def layers(k, n):
    """A float layer and a quantized one of the same shape."""
    pair = {
        "Dense": keras.layers.Dense(n, use_bias=False),
        "BitLinear": BitLinear(n, use_bias=False),
    }
    for layer in pair.values():
        layer.build((None, k))
    return pair


def torch_steps(k, n):
    import torch

    x = torch.randn(TOKENS, k, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    g = torch.randn(TOKENS, n, device="cuda", dtype=torch.bfloat16)

    def step(layer, call):
        def run():
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            for _ in range(STEPS):
                x.grad = layer.kernel.value.grad = None
                call(x).backward(g)
            end.record()
            end.synchronize()
            return begin.elapsed_time(end) / STEPS

        return run

    pair = layers(k, n)
    eager = {f"{name} eager": step(layer, layer) for name, layer in pair.items()}
    compiled = {
        f"{name} compiled": step(layer, torch.compile(layer)) for name, layer in pair.items()
    }
    return eager | compiled


def jax_steps(k, n):
    import jax

    x = jax.random.normal(jax.random.key(0), (TOKENS, k), "bfloat16")
    g = jax.random.normal(jax.random.key(1), (TOKENS, n), "bfloat16")

    def product(layer, kernel, x):
        if isinstance(layer, keras.layers.Dense):  # outside of Keras its kernel is not cast
            return x @ kernel.astype(x.dtype)
        fixed = [v.value for v in layer.non_trainable_variables]
        return layer.stateless_call([kernel], fixed, x)[0]

    def step(layer):
        kernel = layer.kernel.value

        @jax.jit
        def gradients(kernel, x, g):
            y, backward = jax.vjp(functools.partial(product, layer), kernel, x)
            return y, backward(g)

        def run():
            begin = time.perf_counter()
            jax.block_until_ready([gradients(kernel, x, g) for _ in range(STEPS)])
            return (time.perf_counter() - begin) / STEPS * 1000

        return run

    return {f"{name} jit": step(layer) for name, layer in layers(k, n).items()}


def main():
    """Runs everything, writes the results, prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--output", type=pathlib.Path, default=common.RESULTS / f"gpu_training_{BACKEND}.json"
    )
    output = parser.parse_args().output
    keras.config.set_dtype_policy("mixed_bfloat16")
    records = []
    for k, n in SHAPES:
        steps = torch_steps(k, n) if BACKEND == "torch" else jax_steps(k, n)
        times = common.in_turns(steps, REPEATS, warmup=3)
        ratios = {}
        for name in (name for name in times if name.startswith("BitLinear")):
            other = times[name.replace("BitLinear", "Dense")]
            ratios[name] = float(np.median(np.divide(times[name], other)))
        spreads = {name: common.spread(values) for name, values in times.items()}
        records.append({"in": k, "out": n, "milliseconds": spreads, "ratio": ratios})
        print(f"{k}->{n}:", {name: round(s["median"], 3) for name, s in spreads.items()}, ratios)
    head = common.header(gpu=common.gpu(), tokens=TOKENS, steps=STEPS, repeats=REPEATS)
    common.write_json(output, {**head, "rows": records})


if __name__ == "__main__":
    main()
