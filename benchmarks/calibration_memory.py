"""Calibrates on a stream of a million samples, by every method, and looks at the memory.

The samples are drawn batch by batch inside a generator, which also takes the measurements: the
resident memory of the process and what Python and NumPy hold (`tracemalloc`), at a tenth of the
stream, when everything is compiled and allocated, and at its end. Held together, the samples
would take 256 MB.

    KERAS_BACKEND=jax python benchmarks/calibration_memory.py
"""

import argparse
import gc
import os
import pathlib
import sys
import time
import tracemalloc

os.environ.setdefault("KERAS_BACKEND", "jax")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
sys.path.insert(0, str(pathlib.Path(__file__).parent))

import common
import keras
import numpy as np

import keras_bitnet
from keras_bitnet.layers import BitLinear
from keras_bitnet.transforms.observers import METHODS

FEATURES = 64


class Stream:
    """Batches of random samples, one after the other, and the memory while they pass."""

    def __init__(self, samples, batch_size):
        self.batches, self.batch_size = samples // batch_size, batch_size
        self.taken, self.memory = 0, []

    def __iter__(self):
        rng = np.random.default_rng(0)
        for i in range(self.batches):
            if i in (self.batches // 10, self.batches - 1):
                self._measure()
            self.taken += self.batch_size
            yield (rng.standard_normal((self.batch_size, FEATURES), "float32"),)

    def _measure(self):
        gc.collect()
        pages = int(pathlib.Path("/proc/self/statm").read_text().split()[1])
        resident = pages * os.sysconf("SC_PAGE_SIZE")
        self.memory.append({"resident": resident, "python": tracemalloc.get_traced_memory()[0]})


def measure(method, samples, batch_size):
    """A row of the result."""
    keras.utils.set_random_seed(0)
    layers = [BitLinear(FEATURES, "relu"), BitLinear(8)]
    model = keras.Sequential([keras.Input((FEATURES,)), *layers])
    stream = Stream(samples, batch_size)
    start = time.perf_counter()
    calibrated = keras_bitnet.calibrate(model, iter(stream), method, verbose=0)
    early, late = stream.memory
    if stream.taken != samples or not all(layer.calibrated for layer in calibrated.layers):
        raise SystemExit(f"{method}: took {stream.taken} samples of {samples}")
    return {
        "method": method,
        "samples": stream.taken,
        "seconds": round(time.perf_counter() - start, 1),
        "scales": [float(layer.activation_scale) for layer in calibrated.layers],
        "at_a_tenth": early,
        "at_the_end": late,
        "growth": {name: late[name] - early[name] for name in early},
    }


def main():
    """Measures every method, writes `results/calibration_memory_<backend>.json`."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--samples", type=int, default=1_000_000)
    parser.add_argument("--batch-size", type=int, default=1000)
    name = f"calibration_memory_{keras.backend.backend()}.json"
    parser.add_argument("--output", default=common.RESULTS / name)
    arguments = parser.parse_args()
    settings = {"features": FEATURES, "batch_size": arguments.batch_size}
    tracemalloc.start()
    rows = []
    for method in METHODS:
        rows.append(measure(method, arguments.samples, arguments.batch_size))
        print(rows[-1], flush=True)
    common.write_json(arguments.output, {**common.header(**settings), "results": rows})
    cells = [
        (row["method"], f"{row['samples']:,}", row["seconds"],
         *(f"{row['growth'][kind] / 1e6:+.2f}" for kind in ("resident", "python")))
        for row in rows
    ]  # fmt: skip
    headers = ("Method", "Samples", "s", "resident, MB", "Python, MB")
    print(common.markdown(headers, cells))


if __name__ == "__main__":
    main()
