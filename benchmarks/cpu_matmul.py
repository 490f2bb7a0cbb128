"""Times the packed matmul on a CPU beside its peers, interleaved in one run.

    KERAS_BACKEND=jax python benchmarks/cpu_matmul.py [--quick] [--threads 2] [--bits 2]

Every candidate first has to give the right result, then they are timed in turns of some calls; the
table holds medians. Each candidate owns several copies of its weights and takes the next one for
each call, so that they come from memory and not from a cache. Writes
`results/cpu_matmul_<backend>_<threads>_threads.json` and `.png` and prints a Markdown table.
"""

import argparse
import os
import pathlib
import statistics
import sys
import time

HERE = pathlib.Path(__file__).parent
SHAPES = ((2560, 2560), (4096, 4096), (4096, 14336), (14336, 4096))  # in, out
ROWS = (1, 4, 16, 64, 256)


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="two shapes, three sizes, few rounds")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--bits", type=int, default=2, choices=(1, 2, 4, 8))
    parser.add_argument("--rounds", type=int, default=None)
    parser.add_argument("--cold-mebibytes", type=int, default=96, help="weights of a candidate")
    parser.add_argument("--results", type=pathlib.Path, default=HERE / "results")
    return parser.parse_args()


ARGS = arguments()
# Before any framework starts: they size their pools by the CPUs that the process may use.
os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: ARGS.threads])
os.environ.setdefault("OMP_NUM_THREADS", str(ARGS.threads))
# OpenMP's barriers spin by default; on a busy machine that costs a time slice (16 ms) a call.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
sys.path[:0] = [str(HERE.parent), str(HERE)]

import common
import keras
import numpy as np
from cpu_ceilings import Ceilings
from cpu_peers import PEERS

from keras_bitnet import kernels
from keras_bitnet.kernels import native
from keras_bitnet.layers import BitLinear
from keras_bitnet.ops import PackedTensor

BACKEND = keras.backend.backend()
QUANTIZER = {1: "binary", 2: "ternary", 4: "int4", 8: "int8"}[ARGS.bits]
CHECKED_COLUMNS = 64
BUDGET = 1.0  # seconds of samples of a candidate at one size
TURN, SLOW = 5, 0.02  # calls that a candidate makes in its turn, unless one takes so many seconds
PAUSE = 0.02  # seconds


class Case:
    """One shape: a float weight, its packed twin, activations, and the right results."""

    def __init__(self, k, n, rows):
        rng = np.random.default_rng(0)
        self.k, self.n = k, n
        self.weight = rng.standard_normal((k, n), np.float32)
        self.x = {m: rng.standard_normal((m, k), np.float32) for m in rows}
        layer = BitLinear(n, use_bias=False, weight_quantizer=QUANTIZER)
        layer.build((None, k))
        layer.kernel.assign(self.weight)
        self.source = layer
        self.layer = self.packed_twin()
        packed = self.layer.packed_kernel
        arrays = (keras.ops.convert_to_numpy(v) for v in (packed.tiles, packed.scale))
        self.packed = PackedTensor(*arrays, packed.offset, packed.bits, k, n, packed.group_size)
        codes = keras.ops.convert_to_numpy(packed.codes())[:, :CHECKED_COLUMNS]
        scale = np.broadcast_to(self.packed.scale, (1, n))[:, :CHECKED_COLUMNS]
        self.dequantized = (codes + packed.offset) * scale.astype(np.float64)

    def packed_twin(self, **arguments):
        """A packed layer of the same weight, with other arguments."""
        layer = BitLinear(
            self.n, use_bias=False, weight_quantizer=QUANTIZER, packed=True, **arguments
        )
        layer.build((None, self.k))
        layer.pack_from(self.source)
        return layer

    def expected(self, m, weight):
        """float64 results of the first columns; of the packed weight where `weight` is None."""
        if weight is not None:
            return self.x[m].astype(np.float64) @ weight[:, :CHECKED_COLUMNS]
        largest = np.maximum(np.abs(self.x[m]).max(-1, keepdims=True), np.float32(1e-5))
        codes = np.rint(self.x[m] * (np.float32(127) / largest))
        return (codes * (largest / 127)) @ self.dequantized

    def copies(self, nbytes):
        """How many copies of a weight of so many bytes no cache can hold, at least two."""
        return max(2, -(-(ARGS.cold_mebibytes << 20) // nbytes))


def keras_call(layer, case, nbytes):
    """`call(m, i)`: the layer as its backend calls it, on the i-th copy of its weights.

    JAX compiles it; in PyTorch and TensorFlow the call is eager.
    """
    copies = case.copies(nbytes)
    x = {m: keras.ops.convert_to_tensor(value) for m, value in case.x.items()}
    if BACKEND == "jax":
        function = compiled_call(layer, x, copies)
    else:
        layers = [layer, *(copied(layer, case.k) for _ in range(copies - 1))]
        for each in layers:
            for value in x.values():  # first calls do more
                each(value)

        def function(m, i):
            return layers[i % copies](x[m])

    def call(m, i):
        with common.inference():
            begin = time.perf_counter()
            y = function(m, i)
            return time.perf_counter() - begin, y

    return call


def copied(layer, in_features):
    """Another layer of the same weights."""
    other = type(layer).from_config(layer.get_config())
    other.build((None, in_features))
    other.set_weights(layer.get_weights())
    return other


def compiled_call(layer, x, copies):
    """`function(m, i)`: the layer as one compiled function of its weights and inputs."""
    import jax

    weights = [[keras.ops.copy(v.value) for v in layer.variables] for _ in range(copies)]

    @jax.jit
    def run(values, x):
        by_variable = {id(v): value for v, value in zip(layer.variables, values, strict=True)}
        groups = (layer.trainable_variables, layer.non_trainable_variables)
        return layer.stateless_call(*([by_variable[id(v)] for v in g] for g in groups), x)[0]

    return lambda m, i: run(weights[i % copies], x[m]).block_until_ready()


def packed_layer(case):
    """The public layer with the kernel it chooses by itself."""
    return keras_call(case.layer, case, case.packed.nbytes), None, 1e-5


def trits_layer(case):
    """The same packed with `memory="smallest"`."""
    if ARGS.bits != 2:
        raise common.Skip("the layout of 1.6 bits is for ternary weights")
    layer = case.packed_twin(packed_layout="trits")
    return keras_call(layer, case, layer.packed_kernel.nbytes), None, 1e-5


def float_inputs(case):
    """The packed weight alone: inputs that no quantizer touches."""
    layer = case.packed_twin(activation_quantizer=None)
    return keras_call(layer, case, case.packed.nbytes), case.dequantized, 1e-5


def bare_abi(case):
    """The C ABI over ctypes and NumPy: what the adapters stand on."""
    tiles = [case.packed.tiles.copy() for _ in range(case.copies(case.packed.nbytes))]
    out = {m: np.empty((m, case.n), np.float32) for m in case.x}
    facts = (case.packed.offset, case.packed.bits, case.k, case.n, case.packed.group_size)
    packed = [PackedTensor(copy, case.packed.scale, *facts) for copy in tiles]

    def call(m, i):
        begin = time.perf_counter()
        y = native.matmul(case.x[m], packed[i % len(packed)], out=out[m])
        return time.perf_counter() - begin, y

    return call, None, 1e-5


def keras_dense(case, mode=None):
    """The float layer of the same backend, or what Keras itself quantizes it to."""
    layer = keras.layers.Dense(case.n, use_bias=False)
    layer.build((None, case.k))
    layer.kernel.assign(case.weight)
    if mode is not None:
        layer.quantize(mode)
    nbytes = case.k * case.n * {None: 4, "int8": 1, "int4": 0.5}[mode]
    tolerance = {None: 1e-4, "int8": 0.05, "int4": 0.5}[mode]  # of its weights too
    return keras_call(layer, case, int(nbytes)), case.weight, tolerance


CANDIDATES = {
    "BitLinear": packed_layer,
    "BitLinear, 1.6 bits": trits_layer,
    "BitLinear, float inputs": float_inputs,
    "C ABI": bare_abi,
    "Keras float32": keras_dense,
    "Keras int8": lambda case: keras_dense(case, "int8"),
    "Keras int4": lambda case: keras_dense(case, "int4"),
    **PEERS,
}


def check(name, y, case, m, weight, tolerance):
    y = y if isinstance(y, np.ndarray) else keras.ops.convert_to_numpy(y)
    wanted = case.expected(m, weight)
    error = np.abs(y[:, :CHECKED_COLUMNS] - wanted).max() / np.abs(wanted).max()
    if not error < tolerance:
        raise SystemExit(f"{name}: wrong result for m={m}, relative error {error:.2g}")


def prepare(case, skipped):
    """The candidates that can run and are right: {name: call}."""
    ready = {}
    for name, make in CANDIDATES.items():
        try:
            call, weight, tolerance = make(case)
        except common.Skip as reason:
            skipped[name] = str(reason)
            continue
        for m in case.x:
            check(name, call(m, 0)[1], case, m, weight, tolerance)
        ready[name] = call
    return ready


def rest():
    """Waits until the threads of what ran before are idle.

    Those of frameworks spin for a while: of OpenMP for some 20 ms, of ONNX Runtime for 140 ms.
    """
    for _ in range(50):
        before = time.process_time()
        time.sleep(PAUSE)
        if time.process_time() - before < 0.05 * PAUSE:
            return


def measure(ready, case, rounds, ceilings):
    """Seconds of each call, `{(name, m): [...]}`; a slow candidate takes part in fewer rounds.

    Before each there is a rest, and a call that only wakes its own threads. Then some calls follow
    one another, as those of layers do. The order is another one in each round: a heavy neighbour,
    which leaves the processor slow, is never the same.
    """
    samples = {(name, m): [] for name in ready for m in case.x}
    rng = np.random.default_rng(0)
    for i in range(rounds):
        for place in rng.permutation(len(samples)):
            (name, m), taken = list(samples.items())[place]
            if sum(taken) < BUDGET or len(taken) < 3:
                rest()
                ready[name](m, i * TURN - 1)  # on a copy that the timed calls reach last
                calls = 1 if taken and taken[-1] > SLOW else TURN
                taken += [ready[name](m, i * TURN + j)[0] for j in range(calls)]
        rest()
        ceilings.measure()
        time.sleep(0.5)  # what ran first would be slower after such a load
    return samples


def main():
    shapes, rows = (SHAPES[:2], ROWS[::2]) if ARGS.quick else (SHAPES, ROWS)
    rounds = ARGS.rounds or (7 if ARGS.quick else 15)
    native.set_threads(ARGS.threads)
    width = "" if ARGS.bits == 2 else f"_{ARGS.bits}_bits"
    path = ARGS.results / f"cpu_matmul_{BACKEND}{width}_{ARGS.threads}_threads.json"
    report = {
        **common.header(bits=ARGS.bits, threads=ARGS.threads, rounds=rounds),
        "isa": native.isa(), "kernel": None, "skipped": {}, "rows": [],
    }  # fmt: skip
    ceilings = Ceilings(ARGS.threads, "avx512vnni" in native.isas())
    for k, n in shapes:
        case = Case(k, n, rows)
        report["kernel"] = next(row for row, why in kernels.explain(case.layer) if why is None)
        ready = prepare(case, report["skipped"])
        for (name, m), taken in measure(ready, case, rounds, ceilings).items():
            report["rows"].append({
                "name": name, "in": k, "out": n, "rows": m, "samples": len(taken),
                "median": statistics.median(taken), "best": min(taken),
                "spread": statistics.pstdev(taken), "bits_read": case.packed.nbytes * 8,
            })  # fmt: skip
        report["read_bytes_per_second"] = ceilings.read
        report["vpdpbusd_per_second"] = ceilings.peak
        common.write_json(path, report)  # what is done, should it be stopped
    import cpu_report

    print(cpu_report.table(report), cpu_report.verdicts(report), sep="\n\n")
    cpu_report.roofline(report, path.with_suffix(".png"))


if __name__ == "__main__":
    main()
