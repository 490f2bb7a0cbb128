"""Times the packed matmul on a CUDA GPU beside library kernels, interleaved in one run.

    KERAS_BACKEND=torch|jax python benchmarks/gpu_matmul.py [--quick] [--activations int8|float]
        [--group-size 128]

Activations are quantized to 8 bits, or stay bfloat16; the weights share one scale, or as many
inputs of an output as `--group-size` says. Every candidate with packed weights is checked against
float64 first. Then a CUDA graph (torch) or a compiled loop (jax) calls it with each of several
copies of its weights in turn, more than the L2 cache holds, and the candidates take turns; the
table holds medians in microseconds a call, the quantization of activations included. The power that
a candidate draws at many rows decides the clock of the GPU, which takes some tenths of a second to
get there. So from 64 rows on a candidate runs for that long before each turn that is timed: else it
has the clock that the one before it left; the layer, which is the product, and the plain read are
left out there. "read" is a kernel that only reads the packed bytes (it needs CuPy); on PyTorch the
libraries of `gpu_peers.py` take part where they are installed, but for groups. Writes
`results/gpu_matmul_<backend>.json`, of float activations `.._float.json`, of groups
`.._groups.json`.
"""

import argparse
import dataclasses
import functools
import os
import pathlib
import sys
import time

sys.path.insert(0, str(pathlib.Path(__file__).parent))
# Products are timed one by one; XLA would make one of those that share an operand.
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_disable_hlo_passes=dot-merger"

import common
import keras
import numpy as np
from keras import ops

from keras_bitnet import kernels, quantizers
from keras_bitnet.layers import BitLinear
from keras_bitnet.ops import PackedTensor, bit_matmul, layout
from keras_bitnet.quantizers.activations import ActivationInt8

BACKEND = keras.backend.backend()
SHAPES = ((28672, 8192), (8192, 8192), (14336, 4096), (4096, 14336), (4096, 4096), (2560, 2560))
ROWS = (1, 16, 64, 256, 2048)
OFFSETS = {1: -0.5, 2: -1.0, 4: -8.0, 8: -128.0}
COLD_BYTES = 160_000_000
SETTLE_ROWS, SETTLE, SETTLED_TURNS = 64, 0.4, 5  # from so many rows on; seconds; turns
CALLS = 200 if BACKEND == "jax" else 48  # of a program, at least: they share its launch
READ = r"""
extern "C" __global__ void __launch_bounds__(512) read(const uint4* p, unsigned* out, long long n) {
  unsigned mixed = 0;
  long long i = (long long)blockIdx.x * 2048 + threadIdx.x;
  uint4 v[4];
  #pragma unroll
  for (int k = 0; k < 4; ++k) v[k] = 
    i + k * 512 < n ? __ldcs(p + i + k * 512) : make_uint4(0, 0, 0, 0);
  #pragma unroll
  for (int k = 0; k < 4; ++k) mixed ^= v[k].x ^ v[k].y ^ v[k].z ^ v[k].w;
  if (mixed == 0x12345678u) out[0] = mixed;
}"""


class Case:
    """A shape, a width, a quantizer of activations or `None`; copies of a packed weight."""

    def __init__(self, n, k, bits, quantizer, group_size=None):
        rng = np.random.default_rng(0)
        self.n, self.k, self.bits, self.quantizer = n, k, bits, quantizer
        self.group_size = group_size
        shape = layout.tiles_shape(k, n, bits)
        self.nbytes = int(np.prod(shape))
        raw = rng.integers(0, 256, shape, dtype=np.uint8)
        if bits == 2:
            raw &= ~((raw >> 1) & 0x55)  # ternary: no code 3
        first = ops.convert_to_tensor(raw)
        copies = min(128, max(3, -(-COLD_BYTES // self.nbytes)))
        scales = (-(-k // group_size), n) if group_size else (1, 1)
        self.scale = ops.full(scales, 0.37, "float32")
        self.tiles = [ops.roll(first, i, axis=0) for i in range(copies)]
        self.rng = rng

    def packed(self, tiles):
        """The weight that a copy of the tiles stands for."""
        facts = OFFSETS[self.bits], self.bits, self.k, self.n, self.group_size
        return PackedTensor(tiles, self.scale, *facts)

    def activations(self, rows):
        """Random activations `(rows, k)`."""
        return ops.cast(self.rng.standard_normal((rows, self.k), "float32"), "bfloat16")

    def layer(self):
        """A packed layer of this shape."""
        name = {1: "binary", 2: "ternary", 4: "int4", 8: "int8"}[self.bits]
        quantizer = type(quantizers.get(name))(granularity="tensor", group_size=self.group_size)
        layer = BitLinear(self.n, use_bias=False, weight_quantizer=quantizer, packed=True,
                          activation_quantizer=self.quantizer, dtype="bfloat16")  # fmt: skip
        layer.build((None, self.k))
        return layer

    def codes(self, columns=None):
        """Codes `(k, n)` of the first copy, or of its first columns."""
        columns = columns or self.n
        return layout.unpack(self.tiles[0][: -(-columns // 16)], self.bits, self.k, columns)

    def check(self, name, y, x, tolerance):
        """The first columns against float64."""
        columns = 32
        x = ops.convert_to_numpy(ops.cast(x, "float32"))
        weight = (ops.convert_to_numpy(self.codes(columns)) + OFFSETS[self.bits]) * 0.37
        if self.quantizer is not None:
            largest = np.maximum(np.abs(x).max(-1, keepdims=True), np.float32(1e-5))
            x = np.round(x * (np.float32(127) / largest)) * (largest / 127).astype("float64")
        wanted = x @ weight
        found = ops.convert_to_numpy(ops.cast(y[:, :columns], "float32"))
        error = np.abs(found - wanted).max() / np.abs(wanted).max()
        if not error < tolerance:
            raise SystemExit(f"{name}: wrong result, relative error {error:.2g}")


def candidates(case, x, peers):
    """`{name: functions of no arguments, one for each copy of the weights}`."""
    packs = [case.packed(tiles) for tiles in case.tiles]
    found = {"bit_matmul": [functools.partial(bit_matmul, x, p, case.quantizer) for p in packs]}
    if BACKEND == "torch":
        found |= torch_candidates(case, x)
    else:
        found |= jax_candidates(case, x)
    return found | {
        name: [functools.partial(function, x) for function in functions]
        for name, functions in peers.items()
    }


def torch_candidates(case, x):
    import torch

    layers = [case.layer() for _ in case.tiles]
    for layer, tiles in zip(layers, case.tiles, strict=True):
        layer.kernel_scale.assign(case.scale)
        layer.kernel_tiles.assign(tiles)
    found = {"BitLinear": [functools.partial(layer, x) for layer in layers]}
    count = min(len(case.tiles), max(2, 400_000_000 // (2 * case.n * case.k)))
    weights = [torch.randn(case.n, case.k, device="cuda", dtype=torch.bfloat16)]
    weights += [weights[0].roll(i, 0) for i in range(1, count)]
    found["cuBLAS bf16"] = [functools.partial(torch.mm, x, w.T) for w in weights]
    if len(x) > 16 and case.quantizer is not None:
        codes = torch.randint(-127, 128, x.shape, device="cuda", dtype=torch.int8)
        whole = [torch.randint(-1, 2, (case.n, case.k), device="cuda", dtype=torch.int8)
                 for _ in range(count)]  # fmt: skip
        # The product alone: no quantization and no scales.
        found["torch int8 product"] = [functools.partial(torch._int_mm, codes, w.T) for w in whole]
    try:
        import cupy
    except ImportError:
        return found
    read = cupy.RawKernel(READ, "read")
    out = cupy.zeros(1, "uint32")

    def reads(tiles):
        with cupy.cuda.ExternalStream(torch.cuda.current_stream().cuda_stream):
            units = case.nbytes // 16
            read((-(-units // 2048),), (512,), (tiles.data_ptr(), out, np.int64(units)))

    found["read"] = [functools.partial(reads, tiles) for tiles in case.tiles]
    return found


def jax_candidates(case, x):
    import jax

    count = min(len(case.tiles), max(2, 400_000_000 // (2 * case.n * case.k)))
    weights = [jax.random.normal(jax.random.key(i), (case.k, case.n), "bfloat16")
               for i in range(count)]  # fmt: skip
    return {"XLA bf16": [functools.partial(jax.numpy.matmul, x, w) for w in weights]}


def prepare(functions):
    """A function that calls them all in turn, and returns the seconds of a call on the GPU.

    It takes for how many seconds it calls them before.
    """
    turns = -(-CALLS // len(functions))
    return (prepare_jax if BACKEND == "jax" else prepare_torch)(functions, turns)


def repeat(function, seconds):
    """Calls a function that returns when the work is done, for so long."""
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        function()


def prepare_jax(functions, turns):
    import jax

    # A loop, which XLA records and the GPU repeats; its body has other activations each time.
    x = functions[0].args[0]
    rows = jax.numpy.stack([x * (1 + turn / 64) for turn in range(turns)])
    weights = [f.args[1].tiles if isinstance(f.args[1], PackedTensor) else f.args[1]
               for f in functions]  # fmt: skip

    def turn(total, x, weights):
        results = []
        for f, w in zip(functions, weights, strict=True):
            packed = isinstance(f.args[1], PackedTensor)
            w = dataclasses.replace(f.args[1], tiles=w) if packed else w
            results.append(f.func(x, w, *f.args[2:]))
        results = jax.lax.optimization_barrier(results)
        return total + sum(y[0, 0] for y in results), None

    def program(rows, weights):
        zero = jax.numpy.zeros((), rows.dtype)
        return jax.lax.scan(lambda total, x: turn(total, x, weights), zero, rows)[0]

    compiled = jax.jit(program)
    jax.block_until_ready(compiled(rows, weights))

    def run():
        jax.block_until_ready(compiled(rows, weights))

    def timed(settle):
        repeat(run, settle)
        begin = time.perf_counter()
        run()
        return (time.perf_counter() - begin) / (turns * len(functions))

    return timed


def prepare_torch(functions, turns):
    import torch

    with torch.inference_mode():
        for function in functions:
            function()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(turns):
                for function in functions:
                    function()

    def run():
        graph.replay()
        torch.cuda.synchronize()

    def timed(settle):
        repeat(run, settle)
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1000 / (turns * len(functions))

    return timed


def measure(case, rows, repeats, peers):
    """One record: microseconds a call of every candidate."""
    x = case.activations(rows)
    peers = {name: functions for name, (most, functions) in peers.items() if rows <= most}
    found = candidates(case, x, peers)
    with kernels.use_kernel("cuda"):
        for name in ("bit_matmul", "BitLinear", *peers):
            if name in found:
                # Peers add parts in bfloat16.
                case.check(name, found[name][0](), x, 0.05 if name in peers else 0.02)
        settles = rows >= SETTLE_ROWS
        for name in ("BitLinear", "read") if settles else ():
            found.pop(name, None)
        programs = {name: prepare(functions) for name, functions in found.items()}
    timers = {
        name: functools.partial(program, SETTLE if settles else 0)
        for name, program in programs.items()
    }
    if settles:
        times = common.in_turns(timers, min(repeats, SETTLED_TURNS), warmup=0)
    else:
        times = common.in_turns(timers, repeats)
    record = {
        "out": case.n,
        "in": case.k,
        "bits": case.bits,
        "activations": "float" if case.quantizer is None else "int8",
        "group_size": case.group_size,
        "rows": rows,
        "packed_bytes": case.nbytes,
        "microseconds": {
            name: common.spread([1e6 * seconds for seconds in values])
            for name, values in times.items()
        },
    }
    medians = {name: values["median"] for name, values in record["microseconds"].items()}
    print(
        f"W{case.bits} {case.n}x{case.k} m={rows}: "
        + ", ".join(f"{name} {value:.2f}" for name, value in medians.items()),
        flush=True,
    )
    return record


def prepare_peers(case, skipped):
    if BACKEND != "torch" or case.group_size:
        return {}
    import gpu_peers

    return gpu_peers.prepare(case, skipped)


def main():
    """Runs everything and writes the results after every shape."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="one shape, two sizes")
    parser.add_argument("--activations", choices=("int8", "float"), default="int8")
    parser.add_argument("--group-size", type=int)
    parser.add_argument("--repeats", type=int, default=11)
    parser.add_argument("--output", help="JSON file")
    arguments = parser.parse_args()
    is_float = arguments.activations == "float"
    quantizer, bits, suffix = (None, 4, "_float") if is_float else (ActivationInt8(), 2, "")
    suffix += "_groups" if arguments.group_size else ""
    output = arguments.output or common.RESULTS / f"gpu_matmul_{BACKEND}{suffix}.json"
    shapes, rows = (SHAPES[-1:], (1, 16)) if arguments.quick else (SHAPES, ROWS)
    cases = [(*shape, bits, rows) for shape in shapes]
    if not arguments.quick and not arguments.group_size:
        cases += [(*SHAPES[0], other, (1, 16)) for other in (1, 2, 4, 8) if other != bits]
    records, skipped = [], {}
    for n, k, bits, sizes in cases:
        case = Case(n, k, bits, quantizer, arguments.group_size)
        peers = prepare_peers(case, skipped)
        for m in sizes:
            if m > 256 and (n, k) not in SHAPES[:2]:
                continue
            records.append(measure(case, m, arguments.repeats, peers))
        head = common.header(gpu=common.gpu(), cold_bytes=COLD_BYTES, repeats=arguments.repeats,
                             settle_rows=SETTLE_ROWS, settle_seconds=SETTLE)  # fmt: skip
        common.write_json(output, {**head, "skipped": skipped, "rows": records})


if __name__ == "__main__":
    main()
