"""Runs the native library of an installed wheel on NumPy arrays, without any framework."""

import importlib.util
import pathlib
import types

import numpy as np

# Found, not imported: the package itself wants a backend of Keras.
package = pathlib.Path(importlib.util.find_spec("keras_bitnet").origin).parent
spec = importlib.util.spec_from_file_location("native", package / "kernels/native/__init__.py")
native = importlib.util.module_from_spec(spec)
spec.loader.exec_module(native)

rng = np.random.default_rng(0)
x_codes = rng.integers(-127, 128, (3, 64)).astype(np.int8)
weights = rng.integers(0, 256, (64, 33), np.uint8)
tiles = np.zeros((3, 16, 16, 4), np.uint8)  # 8 bits: a tile is 4 inputs of 16 outputs
for k, n in np.ndindex(weights.shape):
    tiles[n // 16, k // 4, n % 16, k % 4] = weights[k, n]
packed = types.SimpleNamespace(
    tiles=tiles, scale=np.ones((1, 1)), offset=-128.0, bits=8, layout="tiles",
    in_features=64, out_features=33, group_size=None,
)  # fmt: skip
expected = x_codes.astype(np.int64) @ (weights.astype(np.int64) - 128)
for isa in native.isas():
    native.set_isa(isa)
    assert (native.accumulate(x_codes, packed)[:, 0] == expected).all(), isa
    print(f"{isa}: right")
