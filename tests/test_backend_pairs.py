"""A packed file written on one backend loads on every other, integer sums bit for bit."""

import itertools

import numpy as np
import pytest
from helpers import BACKEND, run_python

BACKENDS = ("jax", "torch", "tensorflow")

pytestmark = pytest.mark.skipif(BACKEND != "jax", reason="runs once, on the JAX run of the suite")

COMMON = """
import json, sys, zlib
import keras, numpy as np
import keras_bitnet
from keras_bitnet import ops, quantizers
from keras_bitnet.layers import BitLinear

GRANULARITIES = [("tensor", None), ("channel", None), ("group", 32)]
x = np.random.default_rng(1).normal(size=(5, 70)).astype("float32")

def facts(model):
    sums = []
    for layer in model.layers:
        if isinstance(layer, BitLinear):
            codes, _ = layer.activation_quantizer.quantize(x)
            s = keras.ops.convert_to_numpy(ops.accumulate(codes, layer.packed_kernel))
            sums.append(zlib.crc32(s.astype("<i4").tobytes()))
    return {"sums": sums, "y": keras.ops.convert_to_numpy(model(x)).tolist()}
"""

SAVE = """
keras.utils.set_random_seed(3)
inputs = keras.Input((70,))
outputs = []
for name in ("binary", "ternary", "int2", "int4", "int8"):
    for granularity, group_size in GRANULARITIES:
        q = type(quantizers.get(name))(granularity=granularity, group_size=group_size)
        outputs.append(BitLinear(19, weight_quantizer=q, bias_initializer="ones")(inputs))
model = keras.Model(inputs, keras.layers.Concatenate()(outputs))
packed = keras_bitnet.pack_model(model, verbose=0)
packed.save(sys.argv[1] if len(sys.argv) > 1 else PATH)
qat = keras.ops.convert_to_numpy(model(x))
print(json.dumps({**facts(packed), "qat": qat.tolist()}))
"""

LOAD = """
print(json.dumps({p: facts(keras.models.load_model(p)) for p in PATHS}))
"""


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pairs")
    paths = {b: str(folder / f"{b}.keras") for b in BACKENDS}
    saved = {b: run_python(f"PATH = {paths[b]!r}\n{COMMON}{SAVE}", b) for b in BACKENDS}
    code = f"PATHS = {list(paths.values())!r}\n{COMMON}{LOAD}"
    loaded = {b: run_python(code, b) for b in BACKENDS}
    return saved, {b: {a: loaded[b][paths[a]] for a in BACKENDS} for b in BACKENDS}


@pytest.mark.parametrize(("writer", "reader"), itertools.product(BACKENDS, BACKENDS))
def test_pair(writer, reader, results):
    saved, loaded = results
    wanted, actual = saved[writer], loaded[reader][writer]
    assert len(wanted["sums"]) == 15
    assert actual["sums"] == wanted["sums"]
    largest = np.abs(wanted["y"]).max()
    assert np.abs(np.subtract(actual["y"], wanted["y"])).max() <= 1e-5 * largest


@pytest.mark.parametrize("backend", BACKENDS)
def test_packing_keeps_the_outputs(backend, results):
    saved, _ = results
    y, qat = np.array(saved[backend]["y"]), np.array(saved[backend]["qat"])
    assert np.abs(y - qat).max() <= 1e-5 * np.abs(qat).max()
