"""Memory while `calibrate` reads a long stream: it must not grow with the data.

A million examples of normal numbers, made batch by batch, pass through a quantized perceptron. The
resident memory of the process is read as the stream passes some marks; what it gained since the
first quarter, when all is compiled and the allocators are full, is what the others left behind.

    KERAS_BACKEND=jax|torch|tensorflow python benchmarks/calibration_memory.py
"""

import argparse
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

import keras_bitnet
from keras_bitnet.layers import BitLinear

METHODS = ("minmax", "mse")  # the largest magnitudes only, and a histogram too
MARKS = (0.01, 0.1, 0.25, 0.5, 0.75, 1.0)  # shares of the stream
QUARTER = MARKS.index(0.25)


class Stream:
    """An iterator of batches `(batch, features)` that notes the memory at the marks.

    Attributes:
        memory: `{examples so far: resident bytes}`.
    """

    def __init__(self, settings):
        self.settings = settings
        self.memory = {}

    def __iter__(self):
        rng = np.random.default_rng(0)
        batch, features = self.settings["batch_size"], self.settings["features"]
        count = self.settings["samples"] // batch
        marks = {max(1, round(share * count)) for share in MARKS}
        for i in range(1, count + 1):
            yield (rng.standard_normal((batch, features), "float32"),)
            if i in marks:
                self.memory[i * batch] = common.memory("VmRSS")


def measure(method, settings):
    """A row of the result: memory at the marks, and what was gained since a quarter."""
    widths = settings["units"]
    model = keras.Sequential([keras.Input((settings["features"],)), *map(BitLinear, widths)])
    stream = Stream(settings)
    start = time.perf_counter()
    calibrated = keras_bitnet.calibrate(model, iter(stream), method, verbose=0)
    seconds = time.perf_counter() - start
    if not all(layer.calibrated for layer in calibrated.layers):
        raise RuntimeError("A layer has no scale, so its memory says nothing.")
    values = list(stream.memory.values())
    row = {
        "method": method, "seconds": round(seconds, 1), "resident_bytes": stream.memory,
        "gained_bytes": values[-1] - values[QUARTER], "data_bytes": 4 * settings["samples"]
        * settings["features"],
    }  # fmt: skip
    print(row, flush=True)
    return row


def table(rows):
    """The results as Markdown, in MB."""
    counts = list(rows[0]["resident_bytes"])
    headers = ("Method", *(f"after {count:,}" for count in counts), "gained", "the data")
    cells = [
        (row["method"], *(f"{row['resident_bytes'][c] / 1e6:.1f}" for c in counts),
         f"{row['gained_bytes'] / 1e6:+.1f}", f"{row['data_bytes'] / 1e6:.0f}")
        for row in rows
    ]  # fmt: skip
    return common.markdown(headers, cells)


def main():
    """Runs all methods, writes `results/calibration_memory_<backend>.json`, prints the table."""
    backend = keras.backend.backend()
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--samples", type=int, default=1_000_000)
    parser.add_argument("--output", default=common.RESULTS / f"calibration_memory_{backend}.json")
    arguments = parser.parse_args()
    settings = {
        "samples": arguments.samples, "batch_size": 500, "features": 256, "units": [256, 10],
    }  # fmt: skip
    start = time.perf_counter()
    rows = [measure(method, settings) for method in METHODS]
    common.publish(arguments.output, settings, start, rows, table)


if __name__ == "__main__":
    main()
