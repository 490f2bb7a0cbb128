"""What a step of quantization-aware training costs beside the same step of a float network.

Square layers, `Dense` against `BitLinear` W1.58A8 without a norm, float32, the mean squared
error and SGD: little else than the layers. Timed is `train_on_batch`, both networks in turns,
once as Keras compiles it with `jit_compile=True` and once without. A network whose loss is not
finite or does not fall in the first steps is not timed.

    KERAS_BACKEND=jax|torch|tensorflow python benchmarks/training_step.py [--quick]

On a busy machine, take one core and count processor time:

    taskset -c 0 python benchmarks/training_step.py --clock cpu
"""

import argparse
import itertools
import math
import os
import pathlib
import sys
import time

os.environ.setdefault("KERAS_BACKEND", "jax")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
sys.path.insert(0, str(pathlib.Path(__file__).parent))

import common
import keras
import numpy as np

from keras_bitnet.layers import BitLinear

SETTINGS = {
    "sizes": [256, 1024, 2048],
    "batches": [256, 1024],
    "compiled": [True, False],
    "layers": 3,
    "clock": "wall",
    "seconds_per_case": 10,
    "largest_repeats": 50,
    "checked_steps": 5,
}
QUICK = {"sizes": [256], "batches": [256], "seconds_per_case": 2}
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
LAYERS = {"Dense": keras.layers.Dense, "BitLinear": BitLinear}


def make_model(layer, size, count, compiled):
    """A compiled network of `count` square layers."""
    keras.utils.set_random_seed(0)
    layers = [layer(size, activation="relu") for _ in range(count - 1)]
    model = keras.Sequential([keras.Input((size,)), *layers, layer(size)])
    model.compile(keras.optimizers.SGD(0.1), "mse", jit_compile=compiled)
    return model


def make_step(model, x, y):
    """One step that returns the loss as a number, so it ends when the work is done."""
    return lambda: float(model.train_on_batch(x, y))


def check(name, step, steps):
    """Raises unless the loss is finite and falls."""
    losses = [step() for _ in range(steps)]
    if not (all(map(math.isfinite, losses)) and losses[-1] < losses[0]):
        raise RuntimeError(f"The loss of {name} does not fall, so it is not timed: {losses}")


def forget_compiled():
    """Lets torch compile every case afresh: past its limit of recompilations it runs eagerly."""
    if keras.backend.backend() == "torch":
        import torch

        torch.compiler.reset()


def measure(size, batch, compiled, settings):
    """Times one case; the record of it."""
    forget_compiled()
    rng = np.random.default_rng(0)
    x, y = (
        keras.ops.convert_to_tensor(a) for a in rng.standard_normal((2, batch, size), "float32")
    )
    steps = {}
    for name, layer in LAYERS.items():
        model = make_model(layer, size, settings["layers"], compiled)
        steps[name] = make_step(model, x, y)
        check(name, steps[name], settings["checked_steps"])
    clock = CLOCKS[settings["clock"]]
    trial = common.interleaved_times(steps, repeats=2, warmup=1, clock=clock)
    seconds = sum(min(times) for times in trial.values())
    repeats = int(settings["seconds_per_case"] / seconds)
    repeats = min(max(repeats, 7), settings["largest_repeats"])
    times = common.interleaved_times(steps, repeats, clock=clock)
    ratios = [b / a for a, b in zip(times["Dense"], times["BitLinear"], strict=True)]
    row = {
        "size": size, "batch": batch, "compiled": compiled,
        "seconds": {name: common.spread(values) for name, values in times.items()},
        "ratio": common.spread(ratios),
    }  # fmt: skip
    print(_cells(row), flush=True)
    return row


def _cells(row):
    seconds = [f"{1000 * row['seconds'][name]['median']:.2f}" for name in LAYERS]
    compiled = "yes" if row["compiled"] else "no"
    return (row["size"], row["batch"], compiled, *seconds, f"{row['ratio']['median']:.2f}")


def main():
    """Runs everything, writes `results/training_step_<backend>.json`, prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="one size, short")
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    parser.add_argument("--output")
    arguments = parser.parse_args()
    settings = SETTINGS | (QUICK if arguments.quick else {}) | {"clock": arguments.clock}
    cases = itertools.product(settings["sizes"], settings["batches"], settings["compiled"])
    rows = [measure(*case, settings) for case in cases]
    name = f"training_step_{keras.backend.backend()}.json"
    content = {**common.header(**settings), "results": rows}
    common.write_json(arguments.output or common.RESULTS / name, content)
    headers = ("Size", "Batch", "Compiled", "Dense, ms", "BitLinear, ms", "median ratio")
    print(common.markdown(headers, [_cells(row) for row in rows]))


if __name__ == "__main__":
    main()
