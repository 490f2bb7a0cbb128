"""Measures a whole packed decoder: file, loading, memory, prefill and decoding.

    KERAS_BACKEND=jax python benchmarks/generation.py [--preset tiny] [--threads 2] [--gguf FILE]

A model of the architecture of BitNet b1.58 2B4T with random codes is made packed, saved, loaded
by a fresh process that says how long that took and how much memory, and generates at batch 1.
On a CPU the tokens a second are held against what the memory allows: the bytes that a token
reads over the bandwidth that as many threads reach on as much cold memory in the same run. Before
anything is timed, the tokens are checked against a pass over the whole text without a cache.
Writes `results/generation_<backend>.json`.
"""

import argparse
import itertools
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
sys.path[:0] = [str(pathlib.Path(__file__).parent.parent)]

TINY = {"num_layers": 2, "hidden_dim": 256, "intermediate_dim": 512, "vocabulary_size": 1024}
FULL = "bitnet_b1_58_2b_4t"
PROMPT = 64
BLOCK = 8
TARGETS = {"file_bytes": 0.8e9, "peak_over_file": 1.3, "of_bandwidth": 0.85, "prefill": 110}


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--preset", choices=("full", "tiny"), default="full")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--tokens", type=int, default=64, help="tokens of a timed row")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--gguf", help="a model for llama.cpp, the peer, if it is installed")
    parser.add_argument("--output", help="JSON file, results/generation_<backend>.json by default")
    parser.add_argument("--load", help=argparse.SUPPRESS)  # the fresh process
    return parser.parse_args()


ARGS = arguments()

import common
import keras
import numpy as np
from cpu_ceilings import Ceilings
from keras import ops

import keras_bitnet
from keras_bitnet.models import BitNetCausalLM

BACKEND = keras.backend.backend()


def on_cpu():
    """Whether the model runs on the processor."""
    if BACKEND == "torch":
        return str(ops.zeros(1).device) == "cpu"
    if BACKEND == "jax":
        import jax

        return jax.default_backend() == "cpu"
    import tensorflow as tf

    return not tf.config.list_logical_devices("GPU")


def build():
    """The packed model, filled with random codes one weight at a time."""
    sizes = TINY if ARGS.preset == "tiny" else {}
    model = BitNetCausalLM.from_preset(FULL, packed=True, embedding_quantizer="int8", **sizes)
    rng = np.random.default_rng(0)
    for layer in model._flatten_layers():
        if getattr(layer, "kernel_tiles", None) is not None:
            _randomize(layer, rng)
    keras_bitnet.kernels.use_huge_pages(model)  # as loading does
    return model


def _randomize(layer, rng):
    tiles = rng.integers(0, 256, layer.kernel_tiles.shape, dtype=np.uint8)
    if layer.weight_quantizer.level_count == 3:
        both = tiles & (tiles >> 1) & np.uint8(0x55)
        tiles ^= both << 1  # in fields of two bits, codes 0, 1, 2: 3 becomes 1
    layer.kernel_tiles.assign(tiles)
    size = 1 / (layer.in_features**0.5 * (60 if layer.weight_quantizer.bits == 8 else 0.8))
    scale = rng.uniform(0.9, 1.1, layer.kernel_scale.shape) * size
    layer.kernel_scale.assign(scale.astype(np.float32))


def load(path):
    """What a fresh process reports of loading."""
    ops.convert_to_numpy(ops.zeros(3))  # the backend is up
    before = common.memory("VmRSS")
    start = time.perf_counter()
    keras_bitnet.load_model(path)
    seconds = time.perf_counter() - start
    peak = common.memory("VmHWM")
    size = os.path.getsize(path)
    return {
        "seconds": seconds,
        "before_bytes": before,
        "peak_bytes": peak,
        # Imports take hundreds of megabytes whatever the model; loading adds the difference.
        "peak_over_file": (peak - before) / size,
        "process_over_file": peak / size,
    }


def save_and_load(model):
    """File size, and what loading costs a fresh process; the model it gave."""
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder, "model.keras")
        model.save(path)
        options = ("--preset", ARGS.preset, "--load", str(path))
        run = subprocess.run(
            [sys.executable, __file__, *options], stdout=subprocess.PIPE, text=True, check=True
        )
        return {"file_bytes": path.stat().st_size, "load": json.loads(run.stdout.splitlines()[-1])}


def check(model, prompt):
    """Refuses tokens that a pass over the whole text does not give too."""
    row = model.generate(prompt, max_new_tokens=8)
    logits = ops.convert_to_numpy(model(np.array([row], "int32")))[0, len(prompt) - 1 : -1]
    chosen = logits[np.arange(8), row[len(prompt) :]]
    behind = (logits.max(-1) - chosen) / logits.std(-1)
    # An activation at the edge of rounding may go the other way, so near ties are right too.
    if not np.isfinite(logits).all() or behind.max() > 0.3:
        raise SystemExit(f"wrong tokens: behind the best by {behind.max():.2g} deviations")


def bytes_of_token(model):
    """Bytes that a token reads: every weight once (the tied table too) and the cache."""
    backbone = model.backbone
    weights = sum(
        int(np.prod(v.shape)) * np.dtype(keras.backend.standardize_dtype(v.dtype)).itemsize
        for v in model.variables
    )
    row = backbone.num_key_value_heads * backbone.head_dim * 2 * 4
    return weights + row * backbone.num_layers * (PROMPT + ARGS.tokens // 2)


def generate(model, prompt):
    """Seconds of a prefill, and of a token after it: means of `BLOCK`, which may come together."""
    times, start = [], time.perf_counter()
    for _ in model.stream(prompt, max_new_tokens=ARGS.tokens):
        now = time.perf_counter()
        times.append(now - start)
        start = now
    # The first step after the prompt shares its time where steps are queued ahead.
    times, first = times[2:], times[0]
    blocks = [times[i : i + BLOCK] for i in range(0, len(times) - BLOCK + 1, BLOCK)]
    return first, [statistics.mean(block) for block in blocks]


def measure(model):
    """Rows of prefill and decoding, with the bandwidth of the memory measured between them."""
    prompt = [int(t) for t in np.random.default_rng(1).integers(5, 1000, PROMPT)]
    start = time.perf_counter()
    check(model, prompt)
    generate(model, prompt)  # traces the programs of this length
    first = time.perf_counter() - start
    nbytes = bytes_of_token(model)
    ceilings = Ceilings(ARGS.threads, nbytes=nbytes) if on_cpu() else None
    prefills, steps = [], []
    for _ in range(ARGS.rounds):
        if ceilings:
            ceilings.measure()
        prefill, tokens = generate(model, prompt)
        prefills.append(prefill)
        steps += tokens
    decode = 1 / statistics.median(steps)
    result = {
        "seconds_until_ready": first,
        "prefill_tokens_per_second": PROMPT / statistics.median(prefills),
        "prefill_seconds": prefills,
        "decode_tokens_per_second": decode,
        "step_seconds": common.spread(steps),
        "bytes_per_token": nbytes,
    }
    if ceilings:
        ceilings.measure()
        allowed = ceilings.read / nbytes
        result |= {
            "read_bytes_per_second": common.spread(ceilings.reads),
            "tokens_per_second_of_bandwidth": allowed,
            "of_bandwidth": decode / allowed,
        }
    return result


def llama_cpp(path):
    """The peer: llama.cpp on a GGUF file of the same architecture, or why not."""
    if path is None:
        return {"skipped": "no `--gguf` file"}
    try:
        from llama_cpp import Llama
    except ImportError:
        return {"skipped": "llama-cpp-python is not installed"}
    model = Llama(path, n_threads=ARGS.threads, n_ctx=512, verbose=False)
    times, start = [], time.perf_counter()
    tokens = model.generate(list(range(5, 5 + PROMPT)), temp=0)
    for _ in itertools.islice(tokens, ARGS.tokens):
        times.append(time.perf_counter() - start)
        start = time.perf_counter()
    return {
        "prefill_tokens_per_second": PROMPT / times[0],
        "decode_tokens_per_second": 1 / statistics.median(times[1:]),
    }


def main():
    """Measures, writes the JSON file and prints a table."""
    if ARGS.load:
        print(json.dumps(load(ARGS.load)))
        return
    start = time.perf_counter()
    model = build()
    settings = {"preset": ARGS.preset, "threads": ARGS.threads, "tokens": ARGS.tokens}
    result = common.header(**settings, gpu=common.gpu())
    result |= {"build_seconds": time.perf_counter() - start, "targets": TARGETS}
    result |= save_and_load(model) | measure(model)
    result["peak_bytes"] = common.memory("VmHWM")
    result["llama_cpp"] = llama_cpp(ARGS.gguf)
    name = f"generation_{BACKEND}{'' if ARGS.preset == 'full' else '_tiny'}.json"
    common.write_json(ARGS.output or common.RESULTS / name, result)
    rows = [
        ("file, MB", f"{result['file_bytes'] / 1e6:.0f}"),
        ("load, s", f"{result['load']['seconds']:.1f}"),
        ("peak of loading / file", f"{result['load']['peak_over_file']:.2f}"),
        ("prefill, tokens/s", f"{result['prefill_tokens_per_second']:.0f}"),
        ("decode, tokens/s", f"{result['decode_tokens_per_second']:.1f}"),
    ]
    if "of_bandwidth" in result:
        rows.append(("of the memory bandwidth", f"{result['of_bandwidth']:.2f}"))
    print(common.markdown((result["settings"]["preset"], BACKEND), rows))


if __name__ == "__main__":
    main()
