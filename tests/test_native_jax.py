"""The native CPU kernels under JAX's transformations."""

import dataclasses
import pathlib
import shutil
import subprocess

import pytest
from helpers import BACKEND, relative_error, run_python

if BACKEND != "jax":
    pytest.skip("the jax backend is not the active one", allow_module_level=True)

import jax
import jax.numpy as jnp
import keras
from test_native_adapters import make_packed, packed_layer

from keras_bitnet import kernels
from keras_bitnet.kernels import native
from keras_bitnet.ops import bit_matmul
from keras_bitnet.ops.window import Window
from keras_bitnet.quantizers.activations import ActivationInt8

pytestmark = [
    pytest.mark.skipif(native.library() is None, reason=str(native.reason())),
    pytest.mark.usefixtures("on_cpu"),
]

SOURCES = pathlib.Path(native.__file__).parent / "src"
TARGET = "keras_bitnet_matmul"


@pytest.fixture
def functions(rng):
    """`(native, reference)`: the same function of `(x, bias)`, per-token activations."""
    _, packed = make_packed(rng, 100, 33)

    def run(name):
        def function(x, bias=None):
            with kernels.use_kernel(name):
                return bit_matmul(x, packed, ActivationInt8(), bias)

        return function

    return run("native"), run("reference")


@pytest.fixture
def x(rng):
    return jnp.asarray(rng.normal(size=(4, 5, 100)).astype("float32"))


@pytest.fixture
def bias(rng):
    return jnp.asarray(rng.normal(size=33).astype("float32"))


def same(actual, wanted):
    for a, w in zip(jax.tree.leaves(actual), jax.tree.leaves(wanted), strict=True):
        assert a.shape == w.shape
        assert relative_error(a, w) < 5e-6


def test_jit_calls_the_library(functions, x, bias):
    function = jax.jit(functions[0])
    assert TARGET in function.lower(x, bias).compile().as_text()
    same(function(x, bias), functions[1](x, bias))


TRANSFORMED = {
    "grad": lambda f: jax.grad(lambda x, b: (f(x, b) ** 2).sum(), argnums=(0, 1)),
    "jit of grad": lambda f: jax.jit(jax.grad(lambda x, b: (f(x, b) ** 2).sum(), argnums=(0, 1))),
    "vmap": lambda f: jax.vmap(f, (0, None)),
    "vmap of vmap": lambda f: jax.vmap(jax.vmap(f, (0, None)), (1, None)),
    "vmap over bias": lambda f: lambda x, b: jax.vmap(f)(x, jnp.stack([b, 2 * b, 3 * b, 4 * b])),
    "vmap over bias alone": lambda f: lambda x, b: jax.vmap(f, (None, 0))(x, jnp.stack([b, -b])),
    "vmap of grad": lambda f: jax.vmap(jax.grad(lambda x, b: (f(x, b) ** 2).sum()), (0, None)),
    "grad of vmap": lambda f: jax.grad(
        lambda x, b: (jax.vmap(f, (0, None))(x, b) ** 2).sum(), argnums=(0, 1)
    ),
    "scan": lambda f: lambda x, b: jax.lax.scan(lambda c, v: (c, f(v, b)), 0, x)[1],
    "grad of scan": lambda f: jax.grad(
        lambda x, b: (jax.lax.scan(lambda c, v: (c, f(v, b)), 0, x)[1] ** 2).sum(), argnums=(0, 1)
    ),
    "remat": lambda f: jax.grad(lambda x, b: (jax.checkpoint(f)(x, b) ** 2).sum()),
    "jvp": lambda f: lambda x, b: jax.jvp(f, (x, b), (jnp.cos(x), jnp.sin(b))),
    "jvp of the bias": lambda f: jax.jit(
        lambda x, b: jax.jvp(lambda b: f(x, b), (b,), (jnp.sin(b),))
    ),
    "jacfwd": lambda f: jax.jit(jax.jacfwd(lambda x, b: f(x[0, :2], b), argnums=(0, 1))),
    "jacrev": lambda f: jax.jit(jax.jacrev(lambda x, b: f(x[0, :2], b), argnums=(0, 1))),
    "linearize": lambda f: jax.jit(lambda x, b: jax.linearize(f, x, b)[1](jnp.cos(x), jnp.sin(b))),
    "Hessian": lambda f: jax.jit(
        lambda x, b: jax.jvp(
            jax.grad(lambda x, b: (jnp.tanh(f(x, b)) ** 2).sum(), argnums=(0, 1)),
            (x, b),
            (jnp.cos(x), jnp.sin(b)),
        )
    ),
    "grad of jvp": lambda f: jax.jit(
        jax.grad(
            lambda x, b: (jax.jvp(lambda x: jnp.tanh(f(x, b)), (x,), (jnp.cos(x),))[1] ** 2).sum()
        )
    ),
    "no bias": lambda f: lambda x, b: jax.vmap(jax.grad(lambda v: (f(v) ** 2).sum()))(x),
}


@pytest.mark.parametrize("name", TRANSFORMED)
def test_transformations(name, functions, x, bias):
    transform = TRANSFORMED[name]
    same(transform(functions[0])(x, bias), transform(functions[1])(x, bias))


@pytest.mark.parametrize(
    "name", ["vmap", "vmap of vmap", "grad of vmap", "scan", "remat", "jvp", "Hessian"]
)
def test_transformations_of_a_convolution(name, rng, bias):
    _, packed = make_packed(rng, 100, 33)
    window = Window.of(1, 4, 2, 1, "same", "channels_last")
    x = jnp.asarray(rng.normal(size=(4, 3, 7, 25)).astype("float32"))

    def run(kernel):
        def function(x, bias):
            with kernels.use_kernel(kernel):
                return bit_matmul(x, packed, ActivationInt8(), bias, window=window)

        return function

    transform = TRANSFORMED[name]
    same(transform(run("native"))(x, bias), transform(run("reference"))(x, bias))


def test_forward_mode_through_a_layer(rng, x):
    layer = packed_layer(rng, norm="rms", activation="tanh")

    def derivatives(kernel):
        def call(x):
            with kernels.use_kernel(kernel):
                return layer(x)

        def all_of_them(x):
            slope = jax.grad(lambda x: (call(x) ** 2).sum())
            tangents = [jax.jvp(f, (x,), (jnp.cos(x),)) for f in (call, slope)]
            return tangents, jax.jacfwd(call)(x[0, :1])

        return jax.jit(all_of_them)(x)

    same(derivatives("native"), derivatives("reference"))


def test_vmap_keeps_one_scale_for_each_tensor(rng, x):
    _, packed = make_packed(rng, 100, 33)
    function = lambda v: bit_matmul(v, packed, ActivationInt8("tensor"))  # noqa: E731
    same(jax.vmap(function)(x), jnp.stack([function(v) for v in x]))


def test_vmap_of_static_scales(rng, x):
    _, packed = make_packed(rng, 100, 33)
    quantizer = ActivationInt8("static")
    function = lambda v, s: bit_matmul(v, packed, quantizer, None, s)  # noqa: E731
    scales = jnp.asarray([0.02, 0.03, 0.04, 0.05])
    wanted = jnp.stack([function(v, s) for v, s in zip(x, scales, strict=True)])
    same(jax.jit(jax.vmap(function))(x, scales), wanted)
    same(jax.vmap(function, (0, None))(x, scales[0])[0], wanted[0])


def test_vmap_over_weights(rng, x):
    _, packed = make_packed(rng, 100, 33)
    _, other = make_packed(rng, 100, 33)
    function = lambda v, t: bit_matmul(  # noqa: E731
        v, dataclasses.replace(packed, tiles=t), ActivationInt8()
    )
    actual = jax.vmap(function)(x[:2], jnp.stack([packed.tiles, other.tiles]))
    same(actual, jnp.stack([function(x[0], packed.tiles), function(x[1], other.tiles)]))


@pytest.mark.parametrize("platforms", [("cpu",), ("cpu", "cuda")])
def test_export(platforms, functions, x):
    check = jax.export.DisabledSafetyCheck.custom_call(TARGET)
    shape = jax.ShapeDtypeStruct(jax.export.symbolic_shape("batch, 5, 100"), "float32")
    exporter = jax.export.export(
        jax.jit(functions[0]), platforms=platforms, disabled_checks=[check]
    )
    again = jax.export.deserialize(exporter(shape).serialize())
    same(again.call(x), functions[1](x))


def test_export_of_the_reference_needs_no_custom_call(functions, x):
    exported = jax.export.export(jax.jit(functions[1]), platforms=["cpu"])(x)
    assert TARGET not in exported.mlir_module()
    same(exported.call(x), functions[1](x))


def test_model_export(rng, tmp_path):
    tf = pytest.importorskip("tensorflow", reason="a SavedModel from JAX needs TensorFlow")
    model = keras.Sequential([keras.Input((100,)), packed_layer(rng)])
    with kernels.use_kernel("reference"):
        model.export(str(tmp_path), format="tf_saved_model", verbose=False)
    x = rng.normal(size=(3, 100)).astype("float32")
    loaded = tf.saved_model.load(str(tmp_path))
    assert relative_error(loaded.serve(x), model(x)) < 2e-6


def test_handler_checks_its_operands(rng):
    from keras_bitnet.kernels import cpu
    from keras_bitnet.kernels import jax as adapter

    _, packed = make_packed(rng, 100, 33)
    facts = (cpu.Facts.of(packed, ActivationInt8()),)
    weights = ((packed.tiles, packed.scale, None),)
    call = jax.jit(adapter._ffi_call, static_argnums=0)
    with pytest.raises(jax.errors.JaxRuntimeError, match="tiles must be"):
        jax.block_until_ready(call(facts, jnp.ones((2, 50)), weights, None))


@pytest.mark.parametrize("most", [1, 2])
def test_no_more_threads_than_xla_has(most):
    code = f"""
import json, os
os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:{most}])
import jax
from keras_bitnet.layers import BitLinear
layer = BitLinear(2048, packed=True)
layer.build((None, 2048))
x = jax.numpy.ones((64, 2048))
jax.block_until_ready(x @ jax.numpy.ones((2048, 2048)))
before = len(os.listdir("/proc/self/task"))
layer(x).block_until_ready()
print(json.dumps([len(os.listdir("/proc/self/task")) - before, len(os.sched_getaffinity(0))]))
"""
    if not pathlib.Path("/proc/self/task").is_dir():
        pytest.skip("no /proc on this system")
    # What compiles has threads too: that of the float product must not come from a cache.
    settings = {"JAX_ENABLE_COMPILATION_CACHE": "0", "JAX_PLATFORMS": "cpu"}
    more, processors = run_python(code, **settings)
    assert more == processors - 1  # of the library, beside the one that calls


# Ours and the header's, member by member.
LAYOUT = {
    ("Extension", "XLA_FFI_InternalExtension"): {"type": "type", "next": "next"},
    ("ApiVersion", "XLA_FFI_Api_Version"): {
        "major_version": "major_version", "minor_version": "minor_version"},
    ("ErrorCreate", "XLA_FFI_Error_Create_Args"): {"message": "message", "code": "errc"},
    ("ErrorDestroy", "XLA_FFI_Error_Destroy_Args"): {"error": "error"},
    ("Buffer", "XLA_FFI_Buffer"): {n: n for n in ("dtype", "data", "rank", "dims")},
    ("Buffers", "XLA_FFI_Args"): {"size": "size", "types": "types", "buffers": "args"},
    ("Buffers", "XLA_FFI_Rets"): {"size": "size", "types": "types", "buffers": "rets"},
    ("ByteSpan", "XLA_FFI_ByteSpan"): {"data": "ptr", "size": "len"},
    ("Scalar", "XLA_FFI_Scalar"): {"dtype": "dtype", "value": "value"},
    ("Array", "XLA_FFI_Array"): {"dtype": "dtype", "size": "size", "data": "data"},
    ("Attributes", "XLA_FFI_Attrs"): {
        "size": "size", "types": "types", "names": "names", "values": "attrs"},
    ("NumThreads", "XLA_FFI_ThreadPool_NumThreads_Args"): {
        "context": "ctx", "count": "num_threads"},
    ("Api", "XLA_FFI_Api"): {
        "version": "api_version", "error_create": "XLA_FFI_Error_Create",
        "error_destroy": "XLA_FFI_Error_Destroy",
        "num_threads": "XLA_FFI_ThreadPool_NumThreads"},
    ("CallFrame", "XLA_FFI_CallFrame"): {
        "api": "api", "context": "ctx", "stage": "stage", "arguments": "args",
        "results": "rets", "attributes": "attrs"},
    ("Metadata", "XLA_FFI_Metadata"): {"version": "api_version", "traits": "traits"},
    ("MetadataExtension", "XLA_FFI_Metadata_Extension"): {"metadata": "metadata"},
}  # fmt: skip
VALUES = {
    "kMetadataExtension": "XLA_FFI_Extension_Metadata",
    "kExecuteStage": "XLA_FFI_ExecutionStage_EXECUTE",
    "kInvalidArgument": "XLA_FFI_Error_Code_INVALID_ARGUMENT",
    "kInternal": "XLA_FFI_Error_Code_INTERNAL",
    "kArrayAttribute": "XLA_FFI_AttrType_ARRAY",
    "kScalarAttribute": "XLA_FFI_AttrType_SCALAR",
    **{
        f"k{name}": f"XLA_FFI_DataType_{name}"
        for name in ("PRED", "S8", "S32", "S64", "U8", "F16", "F32", "F64", "BF16")
    },
}


def test_structs_equal_the_header_of_jaxlib(tmp_path):
    import jaxlib

    include = pathlib.Path(jaxlib.__file__).parent / "include"
    header = include / "xla/ffi/api/c_api.h"
    compiler = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if not header.exists() or compiler is None:
        pytest.skip("this jaxlib ships no header, or there is no compiler")
    lines = ['#include "xla/ffi/api/c_api.h"', '#include "xla_ffi.h"']
    if "XLA_FFI_InternalExtension" not in header.read_text():  # its name before jaxlib 0.11
        lines.append("using XLA_FFI_InternalExtension = XLA_FFI_Extension_Base;")
    for (ours, theirs), members in LAYOUT.items():
        for a, b in members.items():
            lines.append(
                f"static_assert(offsetof(xla_ffi::{ours}, {a}) == offsetof({theirs}, {b}) && "
                f'sizeof(xla_ffi::{ours}::{a}) == sizeof({theirs}::{b}), "{ours}.{a}");'
            )
    for a, b in VALUES.items():
        lines.append(f'static_assert(int(xla_ffi::{a}) == int({b}), "{a}");')
    source = tmp_path / "layout.cc"
    source.write_text("\n".join(lines))
    command = [compiler, "-std=c++17", "-fsyntax-only", f"-I{include}", f"-I{SOURCES}", source]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
