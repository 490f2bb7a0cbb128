"""XLA splits packed matmuls over devices by rows and outputs; the weights stay where they are."""

import pytest
from helpers import BACKEND, run_python, simulated_devices

if BACKEND != "jax":
    pytest.skip("the jax backend is not the active one", allow_module_level=True)

CODE = """
import dataclasses, json, re
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from test_native_adapters import make_packed
from keras_bitnet.kernels.cuda import jax as cuda
from keras_bitnet.kernels import jax as native
from keras_bitnet.kernels.cpu import Facts
from keras_bitnet.kernels.jax_calls import registration_error, traced
from keras_bitnet.kernels.native import library
from keras_bitnet.ops.window import Window
from keras_bitnet.quantizers.activations import ActivationInt8, StaticActivation

cuda._workspace = lambda *facts: 0  # the branch of CUDA is traced, and not compiled
registration_error(library(), "kbn_xla_matmul", native.TARGET, "cpu")
MOVES = r"= (\\w+)\\[\\S* (?:all-gather|all-to-all|all-reduce)\\("
rng = np.random.default_rng(0)
mesh = Mesh(np.array(jax.devices()).reshape(2, 2), ("batch", "model"))
rows = rng.normal(size=(4, 6, 256)).astype("float32")
images = rng.normal(size=(4, 12, 64)).astype("float32")
put = lambda a, *axes: jax.device_put(jnp.asarray(a), NamedSharding(mesh, P(*axes)))
results = []
for adapter in (native, cuda):
    for n, granularity, quantizer, layout, *window in (
        (128, "tensor", ActivationInt8(), "tiles"),
        (128, "channel", ActivationInt8("tensor"), "trits"),
        (128, 32, ActivationInt8(), "tiles"),
        (100, "channel", ActivationInt8(), "tiles"),
        (16, "channel", ActivationInt8(), "tiles"),
        (128, "channel", StaticActivation(8), "tiles"),
        (128, "channel", ActivationInt8(), "tiles", Window.of(1, 4, 2, 1, "same", "channels_last")),
    )[: 7 if adapter is native else 6]:
        x = images if window else rows
        _, packed = make_packed(rng, 256, n, 2, granularity, layout=layout)
        bias = rng.normal(size=n).astype("float32")
        facts = Facts.of(packed, quantizer, *window)
        static = jnp.float32(0.02) if quantizer.granularity == "static" else None
        def run(*operands):
            x, *weight = operands
            return traced(adapter.PLACE, (facts,), x, (tuple(weight),), static)[0]
        wanted = np.asarray(jax.jit(run)(x, packed.tiles, packed.scale, bias))
        split = "model" if n == 128 else None
        weights = (put(packed.tiles, split),
                   put(packed.scale, None, split if granularity != "tensor" else None), put(bias))
        loss = lambda x, *w: (run(x, *w) ** 2).sum()
        dx = np.asarray(jax.jit(jax.grad(loss))(x, packed.tiles, packed.scale, bias))
        for axes in (("batch",), (), (None, None, "model"), ("model",)):
            compiled = jax.jit(run).lower(put(x, *axes), *weights).compile()
            y = compiled(put(x, *axes), *weights)
            moved = re.findall(MOVES, compiled.as_text())
            grad = jax.jit(jax.grad(loss))(put(x, *axes), *weights)
            results.append(dict(
                case=[adapter.__name__, n, granularity, quantizer.granularity, axes],
                equal=bool((np.asarray(y) == wanted).all()),
                gradient=float(np.abs(np.asarray(grad) - dx).max() / np.abs(dx).max()),
                last=[None, *y.sharding.spec][-1] if len(y.sharding.spec) == 3 else None,
                moved=moved, split=split,
            ))
print(json.dumps(results))
"""


def test_split_over_devices():
    results = run_python(CODE, **simulated_devices(4))
    assert len(results) == 52
    for result in results:
        assert result["equal"], result
        assert result["gradient"] < 1e-5, result
        assert result["last"] == result["split"], result
        assert "u8" not in result["moved"], result  # the tiles
    assert any(result["moved"] for result in results)
    assert not all(result["moved"] for result in results)
