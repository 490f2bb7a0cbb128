"""The suite runs once per backend: KERAS_BACKEND=jax|torch|tensorflow python -m pytest."""

import gc
import importlib.metadata
import os
import pathlib

os.environ.setdefault("KERAS_BACKEND", "jax")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
# Threads of PyTorch that wait for others by spinning take the core those others need.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# Tests compile a lot and run little.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
os.environ["XLA_FLAGS"] = " ".join([
    os.environ.get("XLA_FLAGS", ""),
    "--xla_cpu_parallel_codegen_split_count=1",
    *("--xla_cpu_use_fusion_emitters=false"  # a version that does not know it ends the process
      for jaxlib in importlib.metadata.distributions(name="jaxlib")
      if jaxlib.version.startswith("0.10.")),
])  # fmt: skip
# On a GPU too, products of float32 are of float32.
os.environ.setdefault("JAX_DEFAULT_MATMUL_PRECISION", "highest")
os.environ.setdefault("NVIDIA_TF32_OVERRIDE", "0")
# The same small programs come again in other files, workers and the processes that tests start.
os.environ.setdefault(
    "JAX_COMPILATION_CACHE_DIR", str(pathlib.Path(__file__).parents[1] / ".pytest_cache" / "jax")
)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")

import keras
import numpy as np
import pytest

gc.disable()  # until all is imported


def pytest_collection_finish():
    """What the imports made stays: the garbage collector need not walk it again and again."""
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)
    gc.enable()


@pytest.fixture(autouse=True)
def _seed():
    keras.utils.set_random_seed(0)


@pytest.fixture
def on_cpu():
    """Where the kernels of the processor run, on a machine with a GPU too."""
    with keras.device("cpu"):
        yield


@pytest.fixture(scope="session")
def whole_graph():
    """Skips where dynamo does not take a plain layer of Keras whole."""
    torch = pytest.importorskip("torch")
    layer = keras.layers.Dense(2)
    layer.build((None, 3))
    try:
        torch.compile(layer, fullgraph=True, backend="eager")(torch.ones(1, 3))
    except torch._dynamo.exc.Unsupported:
        versions = f"PyTorch {torch.__version__} and Keras {keras.version()}"
        pytest.skip(f"{versions} do not compile `Dense` whole")


@pytest.fixture
def rng():
    return np.random.default_rng(0)
