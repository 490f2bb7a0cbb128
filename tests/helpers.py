"""What the tests need from a backend."""

import contextlib
import importlib.util
import json
import os
import pathlib
import subprocess
import sys

import keras
import numpy as np
import pytest
from keras import ops

BACKEND = keras.backend.backend()
KERAS = tuple(map(int, keras.version().split(".")[:2]))
ROOT = pathlib.Path(__file__).parent.parent

# For tests that need no backend, or bring all three.
once = pytest.mark.skipif(BACKEND != "torch", reason="runs once, on the PyTorch run of the suite")


def needs(*modules):
    """A mark for tests that import such modules themselves: every worker collects every file."""
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    return pytest.mark.skipif(bool(missing), reason=f"not installed: {missing}")


def keras_3_15(before):
    """A mark for what Keras does since 3.15: `before` says what it did until then."""
    return pytest.mark.skipif(KERAS < (3, 15), reason=f"Keras before 3.15 {before}")


def to_numpy(x):
    return ops.convert_to_numpy(x)


def compiled(function, *arguments):
    """`function(*arguments)`, on JAX as one program: that compiles faster than many small ones."""
    if BACKEND == "jax":
        import jax

        function = jax.jit(function)
    return function(*arguments)


def trace_once(model):
    """Makes what the first step makes, so that `torch.compile` need not trace the second anew."""
    model.optimizer.build(model.trainable_variables)
    for v in model.trainable_variables:
        v.value.grad = ops.zeros_like(v.value)


def gradient(fn, x):
    """d fn(x) / dx as a NumPy array, on the present backend."""
    if BACKEND == "jax":
        import jax

        return np.asarray(jax.jit(jax.grad(fn))(ops.convert_to_tensor(x)))
    if BACKEND == "torch":
        x = ops.convert_to_tensor(x).detach().clone().requires_grad_(True)
        fn(x).backward()
        return x.grad.cpu().numpy()
    import tensorflow as tf

    x = tf.constant(x)
    with tf.GradientTape() as tape:
        tape.watch(x)
        y = fn(x)
    return tape.gradient(y, x).numpy()


def no_gradient():
    """PyTorch's: rows of its tables refuse where a gradient may be asked for."""
    if BACKEND != "torch":
        return contextlib.nullcontext()
    import torch

    return torch.no_grad()


def bit_layers(model):
    """The quantized layers of a model, at any depth."""
    from keras_bitnet.layers import BitLayer

    return [layer for layer in model._flatten_layers() if isinstance(layer, BitLayer)]


def relative_error(actual, expected):
    """Largest difference as a share of the largest expected magnitude."""
    actual, expected = np.asarray(actual, "float64"), np.asarray(expected, "float64")
    return np.abs(actual - expected).max() / max(np.abs(expected).max(), 1e-30)


def packed_twin(layer, input_shape):
    """The packed twin of a single layer, biases copied."""
    if not layer.built:
        layer.build(input_shape)
    twin = type(layer).from_config({**layer.get_config(), "packed": True})
    twin.build(input_shape)
    twin.pack_from(layer)
    if layer.bias is not None:
        twin.bias.assign(to_numpy(layer.bias))
    return twin


def assert_same_tokens(model, rows, wanted):
    """Asserts that rows that a language model gave are equal.

    Where they part, both tokens must be as good as the best by a twentieth of the deviation of the
    logits: a last bit, which differs between processors, may decide, and each goes on from there.
    """
    for row, other in zip(rows, wanted, strict=True):
        parted = (i for i, pair in enumerate(zip(row, other, strict=True)) if len(set(pair)) == 2)
        at = next(parted, None)
        if at is not None:
            logits = to_numpy(model(np.array([row[:at]], "int32")))[0, -1]
            behind = logits.max() - logits[[row[at], other[at]]]
            assert behind.max() < 0.05 * logits.std(), (row, other)


def mean_error(actual, expected):
    """Mean difference as a share of the mean magnitude.

    For models of several quantized layers: an activation at the edge of rounding may take the
    other side, which changes a few outputs by more than arithmetic does.
    """
    actual, expected = np.asarray(actual, "float64"), np.asarray(expected, "float64")
    return np.abs(actual - expected).mean() / max(np.abs(expected).mean(), 1e-30)


def decibel(signal, error):
    """The power of an array over that of its error, in dB."""
    return 10 * np.log10(np.sum(np.square(signal)) / np.sum(np.square(error)))


def run_json(capsys, *arguments):
    """What a command of the command line prints with `--json`."""
    from keras_bitnet import cli

    assert cli.main([*map(str, arguments), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def simulated_devices(count):
    """The environment of a process with so many JAX devices, all of them on the processor."""
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={count}"
    return {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}


def run_python(code, backend=BACKEND, **environment):
    """Runs code in a fresh process; returns what it printed last, as JSON."""
    code = f"import gc\ngc.disable()\n{code}"  # it ends soon
    paths = [str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")]
    result = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "KERAS_BACKEND": backend, "TF_CPP_MIN_LOG_LEVEL": "3",
             "PYTHONPATH": os.pathsep.join(paths), **environment},
        capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]
    return json.loads(result.stdout.strip().splitlines()[-1])


def damaged(content, rng, trials, reach, most):
    """Copies of a file's bytes with one to `most` of the first `reach` bytes replaced.

    Every third copy is cut short too.
    """
    for trial in range(trials):
        copy = bytearray(content)
        if trial % 3 == 0:
            copy = copy[: rng.integers(1, len(copy))]
        for _ in range(rng.integers(1, most + 1)):
            copy[rng.integers(0, min(len(copy), reach))] = rng.integers(0, 256)
        yield bytes(copy)


def assert_nan_and_infinity_stay_in_their_rows(rms_norm):
    """Of a norm `(x, scale, epsilon)`: a bad number spoils its own row, and shows there."""
    x = np.ones((3, 20), "float32")
    x[1, 3], x[2, 4] = np.nan, np.inf
    y = to_numpy(rms_norm(ops.convert_to_tensor(x), ops.ones(20), 1e-5))
    assert np.isfinite(y[0]).all()
    assert np.isnan(y[1]).all()
    assert np.isnan(y[2, 4])
