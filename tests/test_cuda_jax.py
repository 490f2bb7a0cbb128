"""The CUDA kernels under JAX's transformations: products and norms."""

import pytest
from helpers import BACKEND, relative_error

if BACKEND != "jax":
    pytest.skip("the jax backend is not the active one", allow_module_level=True)

import jax
import jax.numpy as jnp
from test_native_adapters import make_packed, packed_layer

from keras_bitnet import kernels
from keras_bitnet.kernels import norm
from keras_bitnet.kernels.cuda import jax_norm, library
from keras_bitnet.ops import bit_matmul
from keras_bitnet.quantizers.activations import ActivationInt8

if library.reason(0) is not None:
    pytest.skip(library.reason(0), allow_module_level=True)

TARGET = "keras_bitnet_matmul_cuda"


@pytest.fixture
def functions(rng):
    """`(cuda, reference)`: the same function of `(x, bias)`."""
    _, packed = make_packed(rng, 128, 128)

    def of(name):
        def function(x, bias=None):
            with kernels.use_kernel(name):
                return bit_matmul(x, packed, ActivationInt8(), bias)

        return function

    return of("cuda"), of("reference")


def same(actual, wanted):
    for a, w in zip(jax.tree.leaves(actual), jax.tree.leaves(wanted), strict=True):
        assert a.shape == w.shape
        assert relative_error(a, w) < 1e-5


TRANSFORMED = {
    "jit": jax.jit,
    "grad": lambda f: jax.grad(lambda x, b: (f(x, b) ** 2).sum(), argnums=(0, 1)),
    "jit of grad": lambda f: jax.jit(jax.grad(lambda x, b: (f(x, b) ** 2).sum(), argnums=(0, 1))),
    "vmap": lambda f: jax.vmap(f, (0, None)),
    "vmap over bias": lambda f: lambda x, b: jax.vmap(f)(x, jnp.stack([b, 2 * b, 3 * b, 4 * b])),
    "grad of vmap": lambda f: jax.grad(
        lambda x, b: (jax.vmap(f, (0, None))(x, b) ** 2).sum(), argnums=(0, 1)
    ),
    "scan": lambda f: lambda x, b: jax.lax.scan(lambda c, v: (c, f(v, b)), 0, x)[1],
    "grad of scan": lambda f: jax.grad(
        lambda x, b: (jax.lax.scan(lambda c, v: (c, f(v, b)), 0, x)[1] ** 2).sum(), argnums=(0, 1)
    ),
    "remat": lambda f: jax.grad(lambda x, b: (jax.checkpoint(f)(x, b) ** 2).sum()),
    "jvp": lambda f: lambda x, b: jax.jvp(f, (x, b), (jnp.cos(x), jnp.sin(b))),
    "linearize": lambda f: jax.jit(lambda x, b: jax.linearize(f, x, b)[1](jnp.cos(x), jnp.sin(b))),
    "jvp of grad": lambda f: jax.jit(
        lambda x, b: jax.jvp(
            jax.grad(lambda x, b: (jnp.tanh(f(x, b)) ** 2).sum(), argnums=(0, 1)),
            (x, b),
            (jnp.cos(x), jnp.sin(b)),
        )
    ),
}


@pytest.mark.parametrize("name", TRANSFORMED)
def test_transformations(name, functions, rng):
    x = jnp.asarray(rng.normal(size=(4, 5, 128)).astype("float32"))
    bias = jnp.asarray(rng.normal(size=128).astype("float32"))
    transform = TRANSFORMED[name]
    same(transform(functions[0])(x, bias), transform(functions[1])(x, bias))


@pytest.mark.parametrize("norm", [None, "rms"])
def test_forward_mode_of_a_layer(norm, rng):
    layer = packed_layer(rng, norm=norm)
    x = jnp.asarray(rng.normal(size=(4, 100)).astype("float32"))

    def derivatives(name):
        with kernels.use_kernel(name):
            return jax.jvp(layer, (x,), (jnp.cos(x),))

    same(derivatives("cuda"), derivatives("reference"))


@pytest.mark.parametrize("rows", [1, 4, 100])
def test_chain_in_a_command_buffer(rows, functions, rng):
    # Long enough that XLA records it; run often, so that it is replayed with other buffers.
    x = jnp.asarray(rng.normal(size=(rows, 128)).astype("float32"))

    def chain(function):
        def apply(x):
            for _ in range(12):
                x = jnp.tanh(function(x))
            return x

        return jax.jit(apply)

    ours, reference = chain(functions[0]), chain(functions[1])
    assert TARGET in ours.lower(x).compile().as_text()
    for i in range(6):
        v = x * (1 + i)
        assert relative_error(ours(v), reference(v)) < 1e-3


def test_scan_over_stacked_weights(rng):
    # The weights of each turn are written by the kernel just before.
    packs = [make_packed(rng, 1024, 1024)[1] for _ in range(6)]
    tiles = jnp.stack([p.tiles for p in packs])
    x = jnp.asarray(rng.normal(size=(1, 1024)).astype("float32"))

    def run(name):
        def turn(x, t):
            with kernels.use_kernel(name):
                packed = packs[0].__class__(t, packs[0].scale, packs[0].offset, 2, 1024, 1024)
                return jnp.tanh(bit_matmul(x, packed, ActivationInt8())), None

        return jax.jit(lambda x, tiles: jax.lax.scan(turn, x, tiles)[0])(x, tiles)

    assert relative_error(run("cuda"), run("reference")) < 1e-3


def norm_by(name):
    def function(x, gain):
        with kernels.use_kernel(name):
            return norm.rms_norm(x, gain, 1e-5)

    return function


@pytest.mark.parametrize("name", TRANSFORMED)
def test_transformations_of_a_norm(name, rng):
    x = jnp.asarray(rng.normal(size=(4, 5, 128)).astype("float32"))
    gain = jnp.asarray(rng.normal(size=128).astype("float32"))
    transform = TRANSFORMED[name]
    same(transform(norm_by("cuda"))(x, gain), transform(norm_by("reference"))(x, gain))


@pytest.mark.parametrize("rows", [1, 4, 100])
def test_norms_between_products_in_a_command_buffer(rows, functions, rng):
    # A launch may start before the kernel before it ends; it must not read its rows too early.
    x = jnp.asarray(rng.normal(size=(rows, 128)).astype("float32"))
    gain = jnp.asarray(rng.normal(size=128).astype("float32"))

    def chain(product, normalize):
        def apply(x):
            for _ in range(12):
                x = product(normalize(x, gain))
            return x

        return jax.jit(apply)

    ours, reference = (
        chain(functions[0], norm_by("cuda")),
        chain(functions[1], norm_by("reference")),
    )
    assert jax_norm.TARGET in ours.lower(x).compile().as_text()
    for i in range(6):
        v = x * (1 + i)
        assert relative_error(ours(v), reference(v)) < 1e-2


def test_refusals_of_norms(rng):
    x, gain = jnp.ones((3, 20)), jnp.ones(20)

    def reason(x):
        return jax_norm.refuse(norm.Norm.of(x, gain))

    assert reason(x) is None
    assert "int32" in reason(x.astype("int32"))
    assert "not on a CUDA device" in reason(jax.device_put(x, jax.devices("cpu")[0]))


def test_on_the_cpu_the_kernel_of_the_cpu_runs(functions, rng):
    cpu = jax.devices("cpu")[0]
    x = jax.device_put(rng.normal(size=(4, 128)).astype("float32"), cpu)
    with jax.default_device(cpu):
        _, packed = make_packed(rng, 128, 128)
        packed = jax.device_put((packed.tiles, packed.scale), cpu)
    y = bit_matmul(x, _packed(packed), ActivationInt8())
    assert y.devices() == {cpu}


def _packed(tensors):
    from keras_bitnet.ops import PackedTensor

    return PackedTensor(*tensors, -1.0, 2, 128, 128)
