"""The native library against NumPy int64, on every instruction set that runs here."""

import ctypes
import math
import os
import subprocess
import sys
import threading

import ml_dtypes
import numpy as np
import pytest
from helpers import once, to_numpy
from keras import ops

from keras_bitnet import quantizers
from keras_bitnet.kernels import native
from keras_bitnet.ops import PackedTensor, layout
from keras_bitnet.ops.window import Window

pytestmark = [
    once,
    pytest.mark.skipif(native.library() is None, reason=str(native.reason())),
]

ISAS = native.isas() if native.library() is not None else []
WEIGHTS = {  # name -> (bits, offset, largest code)
    "binary": (1, -0.5, 1),
    "ternary": (2, -1.0, 3),
    "trits": (2, -1.0, 2),
    "int2-stretched": (2, -1.5, 3),
    "int2-integer": (2, -2.0, 3),
    "int4": (4, -8.0, 15),
    "int8": (8, -128.0, 255),
}
DTYPES = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16, "float16": np.float16}
GAIN = np.ones(4, np.float32)
SIZES = (1, 7, 31, 33, 100, 257)
ROWS = (1, 2, 3, 5, 13, 17, 64)


@pytest.fixture(autouse=True)
def _restore():
    count = native.threads()
    yield
    native.set_isa("auto")
    native.set_threads(count)


def make(weight, k, n, granularity="channel", seed=0):
    """A packed weight of random codes and scales, and its codes."""
    bits, offset, top = WEIGHTS[weight]
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, top + 1, (k, n))
    group_size = granularity if isinstance(granularity, int) else None
    groups = 1 if group_size is None else -(-k // group_size)
    scale = rng.uniform(0.5, 2, (groups, 1 if granularity == "tensor" else n))
    layout = "trits" if weight == "trits" else "tiles"
    return PackedTensor.from_codes(codes, scale, offset, bits, group_size, layout), codes


def skip_grouped_trits(weight, granularity):
    if weight == "trits" and isinstance(granularity, int):
        pytest.skip("the layout of trits has no groups")


def oracle_sums(x_codes, packed, codes):
    """`sum_k step * (code + offset) * x_code`, (m, groups, n), in int64."""
    step = 1 if float(packed.offset).is_integer() else 2
    weights = step * codes.astype(np.int64) + int(step * packed.offset)
    size = packed.group_size or packed.in_features
    starts = range(0, packed.in_features, size)
    x_codes = x_codes.astype(np.int64)
    return np.stack([x_codes[:, i : i + size] @ weights[i : i + size] for i in starts], axis=1)


def oracle_quantize(x, highest=127, per_tensor=False, epsilon=1e-5, x_scale=None):
    """Codes and scales, every step in float32."""
    x = np.asarray(x).astype(np.float32)
    axis = None if per_tensor else -1
    largest = np.maximum(np.abs(x).max(axis=axis, keepdims=True), np.float32(epsilon))
    inverse = np.float32(highest) / largest
    scale = np.broadcast_to(largest * (np.float32(1) / np.float32(highest)), (len(x), 1))
    if x_scale is not None:
        inverse, scale = np.float32(1) / np.float32(x_scale), np.full((len(x), 1), x_scale, "f")
    return np.clip(np.rint(x * inverse), -highest, highest).astype(np.int8), scale[:, 0]


def oracle_matmul(x, packed, codes, bias=None, **quantize):
    """In float64, rounded to float32 at the end."""
    x_codes, x_scale = oracle_quantize(x, **quantize)
    step = 1 if float(packed.offset).is_integer() else 2
    sums = oracle_sums(x_codes, packed, codes) / step
    y = (sums * packed.scale.astype(np.float64)).sum(axis=1) * x_scale[:, None]
    return y if bias is None else y + bias


def guarded(shape, dtype):
    """An array of NaN inside a larger buffer; the second value checks the bytes around it."""
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    buffer = np.full(size + 128, 0xA5, np.uint8)
    array = buffer[64 : 64 + size].view(dtype).reshape(shape)
    array[...] = np.nan

    def check():
        assert (buffer[:64] == 0xA5).all()
        assert (buffer[64 + size :] == 0xA5).all()

    return array, check


@pytest.mark.parametrize("size", [(1, 1), (33, 5), (97, 33), (254, 100)])
def test_tiles_of_trits_are_those_of_numpy(size):
    rng = np.random.default_rng(2)
    trits = layout.pack_trits(rng.integers(0, 3, size))
    found = native.tiles_from_trits(trits, size[0])
    np.testing.assert_array_equal(found, layout.tiles_from_trits(trits, size[0]))
    half = trits[:, ::2]  # not contiguous
    wanted = layout.tiles_from_trits(half, size[0])
    np.testing.assert_array_equal(native.tiles_from_trits(half, size[0]), wanted)
    trits[-1, -1] = 243
    with pytest.raises(ValueError, match="at most 242"):
        native.tiles_from_trits(trits, size[0])
    with pytest.raises(ValueError, match="shape"):
        native.tiles_from_trits(trits, size[0] + 5)


@pytest.mark.parametrize("granularity", ["channel", 32, 64])
@pytest.mark.parametrize("weight", WEIGHTS)
@pytest.mark.parametrize("isa", ISAS)
def test_sums_are_exact(isa, weight, granularity):
    skip_grouped_trits(weight, granularity)
    native.set_isa(isa)
    rng = np.random.default_rng(1)
    for k in SIZES:
        for n in SIZES:
            packed, codes = make(weight, k, n, granularity)
            for m in ROWS:
                x_codes = rng.integers(-128, 128, (m, k)).astype(np.int8)
                got = native.accumulate(x_codes, packed)
                assert (got == oracle_sums(x_codes, packed, codes)).all(), (m, k, n)


@pytest.mark.parametrize("weight", WEIGHTS)
@pytest.mark.parametrize("isa", ISAS)
def test_sums_of_extreme_codes(isa, weight):
    """Where 16-bit sums would saturate and shifted sums would leave int32."""
    native.set_isa(isa)
    bits, offset, top = WEIGHTS[weight]
    layout = "trits" if weight == "trits" else "tiles"
    for k in (64, 2049, 70_001):
        codes = np.full((k, 17), top)
        packed = PackedTensor.from_codes(codes, np.ones((1, 1)), offset, bits, None, layout)
        for m in (1, 2, 5):
            for extreme in (-128, 127):
                x_codes = np.full((m, k), extreme, np.int8)
                expected = oracle_sums(x_codes, packed, codes)
                assert (native.accumulate(x_codes, packed) == expected).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("granularity", ["tensor", "channel", 32, 64, 96])
@pytest.mark.parametrize("weight", WEIGHTS)
@pytest.mark.parametrize("isa", ISAS)
def test_output(isa, weight, granularity, dtype):
    skip_grouped_trits(weight, granularity)
    native.set_isa(isa)
    rng = np.random.default_rng(2)
    for k in SIZES:
        for n in SIZES:
            packed, codes = make(weight, k, n, granularity)
            m = ROWS[rng.integers(len(ROWS))]
            x = (rng.standard_normal((m, k)) / k).astype(DTYPES[dtype])
            bias = rng.standard_normal(n).astype(np.float32) if n % 2 else None
            y, check_guards = guarded((m, n), DTYPES[dtype])
            native.matmul(x, packed, bias=bias, out=y)
            check_guards()
            expected = oracle_matmul(x, packed, codes, bias)
            tolerance = 1e-5 if dtype == "float32" else 2.0**-8 if dtype == "bfloat16" else 2.0**-11
            scale = np.abs(expected).max()
            np.testing.assert_allclose(y.astype(float), expected, tolerance, 1e-6 * scale)


@pytest.mark.parametrize("isa", ISAS)
def test_output_without_groups_is_the_formula(isa):
    """One channel scale: three float32 operations, so equal to the last bit."""
    native.set_isa(isa)
    rng = np.random.default_rng(3)
    packed, codes = make("int2-stretched", 257, 100)
    x = rng.standard_normal((13, 257)).astype(np.float32)
    bias = rng.standard_normal(100).astype(np.float32)
    x_codes, x_scale = oracle_quantize(x)
    sums = oracle_sums(x_codes, packed, codes)[:, 0].astype(np.float32)
    expected = sums * (packed.scale[0] * np.float32(0.5)) * x_scale[:, None] + bias
    assert (native.matmul(x, packed, bias=bias) == expected).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("granularity", ["tensor", "channel", 64])
@pytest.mark.parametrize("weight", WEIGHTS)
@pytest.mark.parametrize("isa", ISAS)
def test_float_activations(isa, weight, granularity, dtype):
    """Off by 2^-24 of the largest input and float32 rounding, then rounded to the dtype."""
    skip_grouped_trits(weight, granularity)
    native.set_isa(isa)
    rng = np.random.default_rng(10)
    for k, n, m in zip(SIZES, reversed(SIZES), ROWS, strict=False):
        packed, codes = make(weight, k, n, granularity)
        x = rng.standard_normal((m, k)) * 10.0 ** rng.integers(-3, 1, (m, 1))
        x = x.astype(DTYPES[dtype])
        x[-1, : k // 2] = 0
        bias = rng.standard_normal(n).astype(np.float32) if n % 2 else None
        y, check_guards = guarded((m, n), DTYPES[dtype])
        native.matmul(x, packed, activation_bits=0, bias=bias, out=y)
        check_guards()
        groups = np.repeat(packed.scale.astype(float), packed.group_size or k, axis=0)[:k]
        kernel = (codes + packed.offset) * groups
        expected = x.astype(float) @ kernel + (0 if bias is None else bias)
        largest = np.abs(x.astype(float)) @ np.abs(kernel) + (0 if bias is None else np.abs(bias))
        relative = {"float32": 1e-6, "bfloat16": 2.0**-8, "float16": 2.0**-11}[dtype]
        close = relative * np.abs(expected) + (2e-6 if dtype == "float32" else 1e-4) * largest
        assert (np.abs(y.astype(float) - expected) <= close).all(), (k, n, m)


@pytest.mark.parametrize("isa", ISAS)
def test_float_activations_at_the_ends_of_float32(isa):
    native.set_isa(isa)
    packed, codes = make("ternary", 64, 33, "tensor")
    rng = np.random.default_rng(11)
    x = rng.standard_normal((5, 64)).astype(np.float32)
    x *= np.float32([[1e36], [1e-25], [1], [0], [1e-44]])
    y = native.matmul(x, packed, activation_bits=0)
    wanted = x.astype(float) @ (codes - 1.0) * packed.scale[0, 0]
    error = np.abs(y - wanted).max(axis=1) / np.abs(wanted).max(axis=1, initial=1e-30)
    assert error.max() < 1e-6


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("isa", ISAS)
def test_quantized_activations_are_the_same_bits(isa, dtype):
    native.set_isa(isa)
    rng = np.random.default_rng(4)
    for k in (*SIZES, 1000):
        x = rng.standard_normal((17, k)) * 10.0 ** rng.integers(-6, 4, (17, 1))
        x = x.astype(DTYPES[dtype])
        x[3] = 0
        x[4] = np.round(x[4].astype(np.float32))  # many halves after scaling
        x[4, 0] = 127
        x[5] = np.arange(k) % 255 - 127 + 0.5
        for options in ({}, {"per_tensor": True}, {"x_scale": 0.02}, {"epsilon": 0.3}):
            for bits, highest in ((8, 127), (4, 7)):
                codes, scales = native.quantize(x, activation_bits=bits, **options)
                expected_codes, expected_scales = oracle_quantize(x, highest, **options)
                assert (codes == expected_codes).all()
                assert (scales == expected_scales).all()


@pytest.mark.parametrize("granularity", ["token", "tensor"])
@pytest.mark.parametrize("bits", [8, 4])
def test_quantized_activations_match_the_quantizer(bits, granularity):
    quantizer = {8: quantizers.ActivationInt8, 4: quantizers.ActivationInt4}[bits](granularity)
    x = np.random.default_rng(5).standard_normal((9, 333)).astype(np.float32)
    expected_codes, expected_scales = quantizer.quantize(x)
    codes, scales = native.quantize(x, bits, granularity == "tensor")
    assert (codes == ops.convert_to_numpy(expected_codes)).all()
    assert (scales == ops.convert_to_numpy(expected_scales).ravel()).all()


@pytest.mark.parametrize("isa", ISAS)
def test_every_float16_and_bfloat16_survives(isa):
    """Widening and narrowing, over all 65536 bit patterns that are finite."""
    native.set_isa(isa)
    packed = PackedTensor.from_codes(np.ones((1, 1), int), np.ones((1, 1)), 0.0, 1)
    for dtype in ("float16", "bfloat16"):
        x = np.arange(2**16, dtype=np.uint16).view(DTYPES[dtype]).reshape(-1, 1)
        x = x[np.isfinite(x.astype(np.float32))].reshape(-1, 1)
        codes, scales = oracle_quantize(x)
        expected = (codes[:, :1].astype(np.float32) * scales[:, None]).astype(DTYPES[dtype])
        got = native.matmul(x, packed)
        same = got.view(np.uint16) == expected.view(np.uint16)
        assert (same | ((got == 0) & (expected == 0))).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("isa", ISAS)
def test_not_finite_input_shows(isa, bad, dtype):
    native.set_isa(isa)
    packed, _ = make("ternary", 100, 33)
    for options in ({}, {"per_tensor": True}, {"x_scale": 0.1}, {"activation_bits": 0}):
        x = np.ones((5, 100), DTYPES[dtype])
        clean = native.matmul(x, packed, **options)
        x[2, 99] = bad
        y = native.matmul(x, packed, **options).astype(np.float32)
        assert not np.isfinite(y[2]).any()
        if not options.get("per_tensor"):
            rest = [0, 1, 3, 4]
            assert (y[rest] == clean[rest].astype(np.float32)).all()


@pytest.mark.parametrize("isa", ISAS)
def test_more_rows_than_a_cache_pass(isa):
    native.set_isa(isa)
    packed, codes = make("ternary", 2050, 50)
    x = np.random.default_rng(6).standard_normal((301, 2050)).astype(np.float32)
    expected = oracle_matmul(x, packed, codes)
    np.testing.assert_allclose(native.matmul(x, packed), expected, 1e-5, 1e-4)


def test_built_files_of_an_editable_install_are_found(tmp_path):
    tree, built = tmp_path / "tree", tmp_path / "built"
    built.mkdir()
    (built / "lib.so").touch()
    assert native.find_built("lib.so", [tree, built]) == built / "lib.so"
    assert native.find_built("other.so", [tree, built]) == tree / "other.so"


def test_a_library_is_looked_for_in_every_folder_of_the_package(tmp_path, monkeypatch):
    monkeypatch.setattr(native, "__file__", str(tmp_path / "__init__.py"))
    assert native.library_path().exists()


def test_unknown_isa():
    with pytest.raises(ValueError, match=r"one of '.*generic'.*Received: 'sse9'"):
        native.set_isa("sse9")


def run_python(code, **environment):
    """Runs code in a fresh process, with `native` loaded alone: no framework to import."""
    prelude = (
        "import importlib.util, os, types, numpy as np\n"
        f"spec = importlib.util.spec_from_file_location('native', {native.__file__!r})\n"
        "native = importlib.util.module_from_spec(spec)\n"
        "spec.loader.exec_module(native)\n"
    )
    return subprocess.run(
        [sys.executable, "-c", prelude + code],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_isa_of_the_environment():
    code = "print(native.isa())"
    assert run_python(code, KERAS_BITNET_ISA="generic").stdout.strip() == "generic"
    result = run_python(code, KERAS_BITNET_ISA="sse9")
    assert "KERAS_BITNET_ISA must be" in result.stderr
    assert "Received: 'sse9'" in result.stderr


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bits": 3}, "bits must be 1, 2, 4 or 8"),
        ({"layout": 2}, "layout must be 0"),
        ({"layout": 1, "group_size": 64}, "Received: layout=1, bits=2, group_size=64"),
        ({"group_size": 48}, "group_size must be a multiple of 32"),
        ({"offset": 0.25}, "offset must be a multiple of 1/2"),
        ({"offset": float("nan")}, "offset must be a multiple of 1/2"),
        ({"in_features": 0}, "in_features"),
        ({"bits": 8, "offset": -128.0, "in_features": 140_000}, "int32"),
        ({"dtype": 7}, "dtype must be"),
        ({"activation_bits": 3}, "activation_bits must be 8, 4 or 0 (float)"),
        ({"activation_bits": 0, "per_tensor": 1}, "have no scale"),
        ({"scale_columns": 2}, "scale_columns must be 1 or out_features=3"),
        ({"epsilon": 0.0}, "epsilon"),
        ({"y": None}, "scale and y must be given"),
        ({"tiles": None}, "tiles must be given"),
        ({"gain": GAIN.ctypes.data, "per_tensor": 1}, "a norm needs an activation scale for each"),
    ],
)
def test_refused_arguments(change, message):
    data = np.zeros(64, np.uint8)
    fields = {
        "rows": 1,
        "in_features": 4,
        "out_features": 3,
        "bits": 2,
        "activation_bits": 8,
        "offset": -1.0,
        "epsilon": 1e-5,
        "scale_columns": 1,
        **dict.fromkeys(("x", "tiles", "scale", "y"), data.ctypes.data),
        **change,
    }
    code = native.library().kbn_run(ctypes.byref(native.MatmulStruct(**fields)), None)
    assert message in native.library().kbn_error(code).decode()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("weight", WEIGHTS)
@pytest.mark.parametrize("granularity", ["tensor", "channel", 64])
def test_joint_products_are_the_same_bits(isa, weight, granularity):
    skip_grouped_trits(weight, granularity)
    native.set_isa(isa)
    rng = np.random.default_rng(4)
    for threads, rows, k, outputs in (
        (1, 1, 100, (33, 1, 17)),
        (2, 1, 640, (1600, 320, 336)),
        (2, 3, 640, (96, 640)),
        (2, 70, 132, (50, 300, 16, 15)),
        (2, 200, 64, (16, 48)),
    ):
        native.set_threads(threads)
        packed = [make(weight, k, n, granularity, n)[0] for n in outputs]
        biases = [rng.normal(size=n).astype("f") if n % 2 else None for n in outputs]
        for dtype, bits in (("float32", 8), ("bfloat16", 4), ("float32", 0)):
            x = rng.normal(size=(rows, k)).astype(DTYPES[dtype])
            results = native.joint_matmul(x, packed, bits, biases)
            for y, one, bias in zip(results, packed, biases, strict=True):
                assert (y == native.matmul(x, one, bits, bias=bias)).all()


def test_joint_products_of_other_weights_are_refused():
    x = np.ones((2, 64), np.float32)
    packed = [make(weight, 64, 20)[0] for weight in ("ternary", "int4")]
    with pytest.raises(ValueError, match=r"agree in all but .* in place 1"):
        native.joint_matmul(x, packed)
    with pytest.raises(ValueError, match=r"count must be in \[1, 8\]. Received: count=0"):
        native.joint_matmul(x, [])


def test_no_rows():
    packed, _ = make("ternary", 33, 31)
    assert native.matmul(np.zeros((0, 33), np.float32), packed).shape == (0, 31)


WINDOWS = [
    (1, 3, 2, 1, "causal"),
    (2, (3, 2), 1, 1, "same"),
    (2, (2, 3), 1, (1, 2), "valid"),
    (2, 1, 3, 1, "same"),
    (3, 2, (1, 2, 1), 1, "same"),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", WINDOWS, ids=str)
def test_patches_of_images(window, dtype):
    """The bits of the same patches as rows, with and without float inputs and a static scale."""
    window = Window.of(*window, "channels_last")
    rng = np.random.default_rng(11)
    x = rng.normal(size=(2, *(7, 6, 5)[: len(window.size)], 3)).astype(DTYPES[dtype])
    packed, _ = make("ternary", 3 * math.prod(window.size), 21)
    out, check = guarded((*window.positions(x.shape), 21), x.dtype)
    x[0].reshape(-1, 3)[-1] = 50  # not seen by every window
    rows = to_numpy(ops.cast(window.patches(x.astype("float32")), "float32")).astype(x.dtype)
    for options in ({}, {"activation_bits": 0}, {"x_scale": 0.03}, {"per_tensor": True}):
        native.matmul(x, packed, out=out, window=window, **options)
        check()
        assert (out == native.matmul(rows, packed, **options)).all()


def test_windows_that_do_not_fit():
    packed, _ = make("ternary", 27, 5)
    window = Window.of(2, 3, 1, 1, "valid", "channels_last")
    x = np.ones((1, 4, 4, 3), np.float32)
    broken = native.WindowStruct.of(window, x.shape)
    broken.positions[1] = 3
    problem = native.MatmulStruct(rows=4, in_features=27, out_features=5, bits=2, activation_bits=8)
    problem.epsilon, problem.offset, problem.scale_columns = 1e-5, -1, 5
    problem.tiles = problem.scale = problem.x = problem.y = packed.tiles.ctypes.data
    problem.window = ctypes.addressof(broken)
    library = native.library()
    assert (
        "a window needs" in library.kbn_error(library.kbn_run(ctypes.byref(problem), None)).decode()
    )
    with pytest.raises(ValueError, match=r"array \(\.\.\., 3\)"):
        native.matmul(x[..., :2], packed, window=window)


@pytest.mark.parametrize("isa", ISAS)
def test_many_rows_by_weights_that_stay_in_the_cache(isa):
    native.set_isa(isa)
    x = np.random.default_rng(12).standard_normal((1500, 100)).astype(np.float32)
    for weight, granularity in (("ternary", "channel"), ("int4", 32)):
        packed, codes = make(weight, 100, 40, granularity)
        wanted = oracle_matmul(x, packed, codes)
        for count in (1, 3):
            native.set_threads(count)
            y = native.matmul(x, packed)
            assert np.abs(y - wanted).max() < 1e-5 * np.abs(wanted).max()


def test_fork_after_load():
    code = """
rng = np.random.default_rng(0)
packed = types.SimpleNamespace(
    tiles=rng.integers(0, 256, (64, 32, 16, 4), np.uint8), scale=np.ones((1, 1)), offset=-1.0,
    bits=2, in_features=512, out_features=1024, group_size=None, layout="tiles",
)
x = rng.standard_normal((9, 512)).astype(np.float32)
native.set_threads(3)
expected = native.matmul(x, packed)
for _ in range(3):
    child = os.fork()
    if child == 0:
        os._exit(not (native.threads() == 3 and (native.matmul(x, packed) == expected).all()))
    assert os.waitpid(child, 0)[1] == 0
assert (native.matmul(x, packed) == expected).all()
"""
    result = run_python(code)
    assert result.returncode == 0, result.stderr


def test_many_threads_on_one_problem():
    packed, _ = make("ternary", 512, 1024)
    x = np.random.default_rng(7).standard_normal((9, 512)).astype(np.float32)
    expected = native.matmul(x, packed)
    wrong = []

    def call():
        for _ in range(5):
            if not (native.matmul(x, packed) == expected).all():
                wrong.append(threading.get_ident())

    callers = [threading.Thread(target=call) for _ in range(64)]
    for caller in callers:
        caller.start()
    for count in (1, 4, 2, 8, 3):
        native.set_threads(count)
    for caller in callers:
        caller.join()
    assert not wrong


def test_thread_count():
    packed, _ = make("int4", 1024, 512)
    x = np.random.default_rng(8).standard_normal((16, 1024)).astype(np.float32)
    native.set_threads(1)
    expected = native.matmul(x, packed)
    for count in (2, 5, 1, 3):
        native.set_threads(count)
        assert native.threads() == count
        assert (native.matmul(x, packed) == expected).all()
    with pytest.raises(ValueError, match="count=0"):
        native.set_threads(0)


def test_odd_addresses():
    """No array needs to be aligned."""
    packed, _ = make("ternary", 100, 33)
    x = np.random.default_rng(9).standard_normal((3, 100)).astype(np.float32)
    expected = native.matmul(x, packed)
    buffer = np.zeros(packed.tiles.size + 1, np.uint8)
    buffer[1:] = packed.tiles.ravel()
    tiles = buffer[1:].reshape(packed.tiles.shape)
    moved = PackedTensor(tiles, packed.scale, packed.offset, 2, 100, 33)
    assert (native.matmul(x, moved) == expected).all()
