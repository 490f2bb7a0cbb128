"""What reading a Hugging Face checkpoint of the size of BitNet b1.58 2B4T takes in memory.

    KERAS_BACKEND=jax python benchmarks/import_memory.py [--preset tiny]

Checkpoints with random weights are written and read by fresh processes, which say how far their
memory rose: by all of it (with the pages of the mapped file, which the system can take back) and
by what is their own. It is held against the model that was read and one float32 matrix, the
table of the tokens, which is the largest. Writes `results/import_memory_<backend>.json`.
"""

import argparse
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import threading
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
sys.path[:0] = [str(pathlib.Path(__file__).parent)]

import common
import keras
import numpy as np
from keras import ops

from keras_bitnet.interop import from_hugging_face, to_hugging_face
from keras_bitnet.models import BitNetCausalLM

FULL = "bitnet_b1_58_2b_4t"
TINY = {"num_layers": 2, "hidden_dim": 256, "intermediate_dim": 512, "vocabulary_size": 1024}
SHARD_BYTES = 500 * 10**6
# (variant of the files, arguments of `from_hugging_face`)
CASES = {
    "packed file": ("offline", {}),
    "packed file, int8 embedding": ("offline", {"embedding_quantizer": "int8"}),
    "float file, packed as it is read": (
        "online",
        {"packed": True, "embedding_quantizer": "int8"},
    ),
}


def write(folder, variant, sizes):
    """A checkpoint with random codes, its floats in bfloat16 as Microsoft's file has them."""
    model = BitNetCausalLM.from_preset(FULL, packed=True, embedding_quantizer="int8", **sizes)
    rng = np.random.default_rng(0)
    for layer in model._flatten_layers():
        if getattr(layer, "kernel_tiles", None) is not None:
            tiles = rng.integers(0, 256, layer.kernel_tiles.shape, dtype=np.uint8)
            if layer.weight_quantizer.level_count == 3:
                tiles &= 0x55  # in fields of two bits, codes 0 and 1
            layer.kernel_tiles.assign(tiles)
            layer.kernel_scale.assign(np.full(layer.kernel_scale.shape, 0.01, "float32"))
    to_hugging_face(model, folder, variant=variant, dtype="bfloat16", shard_bytes=SHARD_BYTES)


class Own(threading.Thread):
    """Looks at the memory that no file backs, again and again; `peak` in bytes."""

    def __init__(self):
        super().__init__(daemon=True)
        self.peak, self._stop_now = 0, threading.Event()

    def run(self):
        """Looks."""
        while not self._stop_now.wait(0.005):
            self.peak = max(self.peak, common.memory("RssAnon"))

    def stop(self):
        """Ends it; the peak."""
        self._stop_now.set()
        self.join()
        return self.peak


def read(folder, case):
    """What a fresh process reports of reading."""
    ops.convert_to_numpy(ops.zeros(3))  # the backend is up
    before = {name: common.memory(name) for name in ("VmRSS", "RssAnon")}
    own = Own()
    own.start()
    start = time.perf_counter()
    model = from_hugging_face(folder, **CASES[case][1])
    seconds = time.perf_counter() - start
    held = sum(
        int(np.prod(v.shape)) * np.dtype(keras.backend.standardize_dtype(v.dtype)).itemsize
        for v in model.variables
    )
    table = 4 * model.backbone.vocabulary_size * model.backbone.hidden_dim
    peak = {
        "peak_bytes": common.memory("VmHWM") - before["VmRSS"],
        "own_peak_bytes": own.stop() - before["RssAnon"],
    }
    return {
        "case": case,
        "seconds": seconds,
        "file_bytes": sum(f.stat().st_size for f in pathlib.Path(folder).glob("*.safetensors")),
        "model_bytes": held,
        "largest_float_matrix_bytes": table,
        **peak,
        "own_peak_over_bound": peak["own_peak_bytes"] / (held + table),
    }


def measure(sizes, preset):
    """The rows, each read by a process of its own."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for case, (variant, _) in CASES.items():
            path = pathlib.Path(folder, variant)
            if not path.exists():
                write(path, variant, sizes)
            command = [sys.executable, __file__, "--preset", preset, "--read", path, "--case", case]
            run = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            rows.append(json.loads(run.stdout.splitlines()[-1]))
    return rows


def table(rows):
    """The results as Markdown."""
    cells = [
        (row["case"], *(f"{row[name] / 1e9:.2f}" for name in _GIGABYTES),
         f"{row['own_peak_over_bound']:.2f}", f"{row['seconds']:.1f}")
        for row in rows
    ]  # fmt: skip
    heads = ("Checkpoint", "file", "model", "one matrix", "peak", "own peak, GB", "to bound", "s")
    return common.markdown(heads, cells)


_GIGABYTES = (
    "file_bytes", "model_bytes", "largest_float_matrix_bytes", "peak_bytes", "own_peak_bytes",
)  # fmt: skip


def main():
    """Measures, writes the JSON file and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--preset", choices=("full", "tiny"), default="full")
    parser.add_argument("--output", help="results/import_memory_<backend>.json by default")
    parser.add_argument("--read", help=argparse.SUPPRESS)  # the fresh process
    parser.add_argument("--case", choices=CASES, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.read:
        print(json.dumps(read(arguments.read, arguments.case)))
        return
    start = time.perf_counter()
    rows = measure(TINY if arguments.preset == "tiny" else {}, arguments.preset)
    output = common.RESULTS / f"import_memory_{keras.backend.backend()}.json"
    common.publish(arguments.output or output, {"preset": arguments.preset}, start, rows, table)


if __name__ == "__main__":
    main()
