"""Attention to a cache by a kernel, on a GPU CUDA's, against NumPy and the reference."""

import dataclasses

import keras
import numpy as np
import pytest
from helpers import BACKEND, assert_same_tokens, compiled, relative_error, to_numpy
from keras import ops
from test_models import make_model

from keras_bitnet import kernels
from keras_bitnet.kernels import attention, native
from keras_bitnet.kernels.cuda import library
from keras_bitnet.layers import key_value_cache
from keras_bitnet.layers.rotary import rotary_tables, rotate

GPU = library.reason(0) is None
if GPU and BACKEND == "tensorflow":
    pytest.skip("TensorFlow runs the reference on a GPU", allow_module_level=True)
if not GPU and native.library() is None:
    pytest.skip(native.reason(), allow_module_level=True)
ROW = "cuda" if GPU else "native"

# batch, new tokens, query heads, key heads, head_dim, cache length, index of the first new token
SIZES = (
    (1, 1, 20, 5, 128, 320, 300), (3, 1, 8, 8, 64, 40, 0), (2, 1, 6, 1, 256, 700, 699),
    (1, 1, 7, 7, 4, 17, 1), (2, 1, 12, 2, 100, 2000, 1234), (40, 1, 4, 1, 32, 64, 63),
    (1, 1, 9, 3, 132, 5000, 4999), (1, 64, 20, 5, 128, 128, 0), (3, 2, 8, 8, 64, 40, 38),
    (2, 33, 6, 1, 256, 300, 17), (1, 3, 130, 1, 4, 17, 1), (2, 10, 12, 2, 100, 2000, 1234),
    (40, 7, 4, 1, 32, 64, 57), (1, 250, 9, 3, 132, 400, 100),
)  # fmt: skip
TOKENS = pytest.mark.parametrize("tokens", [1, 20])
DTYPES = ("float32", "bfloat16", "float16")
CACHE_DTYPES = (*DTYPES, "int8")
TOLERANCE = {"float32": 5e-6, "bfloat16": 1e-2, "float16": 2e-3}


def tensor(array, dtype="float32"):
    return ops.cast(ops.convert_to_tensor(array.astype("float32")), dtype)


def floats(x):
    return to_numpy(ops.cast(x, "float32")).astype("float64")


def problem(rng, size, dtype, cache_dtype):
    """A cache full of numbers, behind the new token too, and the arguments of `attend_next`."""
    batch, tokens, heads, key_heads, head_dim, length, index = size

    def write(*rows):
        cache = key_value_cache.make_cache(batch, length, key_heads, head_dim, cache_dtype)
        return key_value_cache.write(cache, *(ops.cast(x, dtype) for x in rows), 0)

    rows = (rng.normal(size=(batch, length, key_heads, head_dim)) for _ in range(2))
    cache = compiled(write, *(tensor(x) for x in rows))
    query = tensor(rng.normal(size=(batch, tokens, heads, head_dim)), dtype)
    sizes = (batch, tokens, key_heads, head_dim)
    key, value = (tensor(rng.normal(size=sizes), dtype) for _ in range(2))
    mask = rng.random((batch, tokens, length)) < 0.7
    mask |= np.arange(length) == index + np.arange(tokens)[:, None]
    mask[..., index + tokens :] = False
    places = ops.convert_to_tensor(rng.integers(0, length, (batch, tokens)), "int32")
    rotary = compiled(lambda places: rotary_tables(places, head_dim, 10000.0), places)
    at = ops.convert_to_tensor(index, "int32")
    return cache, (query, key, value, at, head_dim**-0.5, ops.convert_to_tensor(mask), rotary)


def run(name, cache, arguments):
    query, key, value, at, scale, *rest = arguments

    def attend(cache, query, key, value, at, *rest):
        with kernels.use_kernel(name):
            return key_value_cache.attend_next(cache, query, key, value, at, scale, *rest)

    cache = {key: ops.copy(x) for key, x in cache.items()}
    return compiled(attend, cache, query, key, value, at, *rest)


def cached(cache, name):
    return floats(cache[name]) * (floats(cache[f"{name}_scale"]) if len(cache) == 4 else 1)


def expected(cache, query, index, scale, mask):
    """In float64, of a cache that holds the new token; `query` is turned already."""
    keys, values = cached(cache, "key"), cached(cache, "value")
    batch, key_heads, length, head_dim = keys.shape
    tokens = query.shape[1]
    query = floats(query).reshape(batch, tokens, key_heads, -1, head_dim) * scale
    scores = np.einsum("bthgd,bhkd->bthgk", query, keys)
    seen = np.arange(length) <= index + np.arange(tokens)[:, None]
    seen = seen[None] if mask is None else to_numpy(mask)
    scores = np.where(seen[:, :, None, None], scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    return np.einsum("bthgk,bhkd->bthgd", weights, values).reshape(batch, tokens, -1, head_dim)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("cache_dtype", CACHE_DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_equals_numpy(dtype, cache_dtype, masked, rng):
    # On JAX each compiles: there, all sizes meet over the parameters.
    step = 3 if BACKEND == "jax" else 1
    for size in SIZES[(DTYPES.index(dtype) + CACHE_DTYPES.index(cache_dtype)) % step :: step]:
        cache, arguments = problem(rng, size, dtype, cache_dtype)
        query, key, value, at, scale, mask, rotary = arguments
        mask, rotary = (mask, rotary) if masked else (None, None)
        y, written = run(ROW, cache, (query, key, value, at, scale, mask, rotary))
        assert y.shape == query.shape
        assert y.dtype == query.dtype
        turned = [x if rotary is None else compiled(rotate, x, rotary) for x in (query, key)]
        wanted = expected(written, turned[0], size[-1], scale, mask)
        # A pair that is turned may be rounded otherwise, where XLA contracts its products.
        assert relative_error(floats(y), wanted) < TOLERANCE[dtype] * (1 + 4 * masked), size
        check_written(cache, written, turned[1], value, size)


def check_written(before, after, key, value, size):
    new = np.arange(size[1]) + size[-1]
    for name, rows in (("key", key), ("value", value)):
        others = np.delete(floats(before[name]), new, axis=2)
        np.testing.assert_array_equal(np.delete(floats(after[name]), new, axis=2), others)
        found = cached(after, name)[:, :, new].transpose(0, 2, 1, 3)
        apart = relative_error(found, floats(rows))
        assert apart < {4: 8e-3}.get(len(after), TOLERANCE["bfloat16"])


@TOKENS
@pytest.mark.parametrize("factors", [(1e15, 1e-15, 1e30), (1e-15, 1e15, 1e-30)])
def test_numbers_of_any_size(factors, tokens, rng):
    cache, arguments = problem(rng, (1, tokens, 6, 2, 64, 90, 50), "float32", "float32")
    query, key, value, at, scale, mask, _ = arguments
    query, key, value = (x * by for x, by in zip((query, key, value), factors, strict=True))
    cache = {"key": cache["key"] * factors[1], "value": cache["value"] * factors[2]}
    y, written = run(ROW, cache, (query, key, value, at, scale, mask, None))
    wanted = expected(written, query, 50, scale, mask)
    assert relative_error(floats(y), wanted) < TOLERANCE["float32"]


@pytest.mark.parametrize("bad", [np.inf, np.nan])
def test_a_token_that_is_not_seen_changes_nothing(bad, rng):
    cache, arguments = problem(rng, (1, 20, 6, 2, 64, 90, 50), "float32", "float32")
    query, key, value, at, scale, *_ = arguments
    broken = floats(key)
    broken[:, -1, 0, 3] = bad
    wanted, _ = run(ROW, cache, (query, key, value, at, scale, None, None))
    y, _ = run(ROW, cache, (query, tensor(broken), value, at, scale, None, None))
    # Their powers of two are others where the key is among those that the kernels scale together.
    assert relative_error(floats(y)[:, :-1], floats(wanted)[:, :-1]) < TOLERANCE["float32"]
    np.testing.assert_array_equal(floats(y)[:, -1, 3:], floats(wanted)[:, -1, 3:])


@pytest.mark.skipif(BACKEND != "torch", reason="only tensors of PyTorch lie anywhere")
def test_queries_that_lie_anywhere(rng):
    cache, (query, *others) = problem(rng, (2, 20, 6, 2, 64, 90, 50), "float32", "float32")
    wanted, _ = run(ROW, cache, (query, *others))
    moved = ops.concatenate([query.flatten()[:1], query.flatten()])[1:].view(query.shape)
    y, _ = run(ROW, cache, (moved, *others))
    np.testing.assert_array_equal(floats(y), floats(wanted))


@pytest.mark.skipif(BACKEND != "torch", reason="XLA contracts products and divides otherwise")
@pytest.mark.parametrize("cache_dtype", CACHE_DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_writes_the_bits_of_the_reference(dtype, cache_dtype, rng):
    for size in SIZES:
        cache, arguments = problem(rng, size, dtype, cache_dtype)
        (y, ours), (wanted, theirs) = (run(name, cache, arguments) for name in (ROW, "reference"))
        assert relative_error(floats(y), floats(wanted)) < TOLERANCE[dtype], size
        for name, x in theirs.items():
            np.testing.assert_array_equal(floats(ours[name]), floats(x))


@TOKENS
def test_what_nobody_sees_does_not_matter(tokens, rng):
    cache, arguments = problem(rng, (1, tokens, 8, 2, 64, 300, 200), "float32", "float32")
    y, _ = run(ROW, cache, arguments)
    hidden = ~to_numpy(arguments[5]).any(1)
    others = {
        name: tensor(np.where(hidden[:, None, :, None], 7.0, floats(x)))
        for name, x in cache.items()
    }
    np.testing.assert_array_equal(floats(run(ROW, others, arguments)[0]), floats(y))
    late = {
        name: tensor(np.where(np.arange(300)[:, None] >= 200, np.nan, floats(x)))
        for name, x in cache.items()
    }
    np.testing.assert_array_equal(floats(run(ROW, late, arguments)[0]), floats(y))


@TOKENS
def test_nan_is_not_lost(tokens, rng):
    cache, arguments = problem(rng, (1, tokens, 8, 2, 64, 300, 200), "float32", "int8")
    query, key, *rest = arguments
    bad = tensor(np.where(np.arange(64) == 3, np.nan, floats(key)))
    y, written = run(ROW, cache, (query, bad, *rest))
    assert np.isnan(floats(y)).all()
    assert np.isnan(floats(written["key_scale"])[:, :, 200 : 200 + tokens]).all()


def test_a_longer_cache_has_the_same_result(rng):
    # More blocks share the tokens; their order of sums differs.
    _, arguments = problem(rng, (2, 1, 8, 2, 128, 64, 50), "float32", "float32")
    cache, _ = problem(rng, (2, 1, 8, 2, 128, 64, 50), "float32", "float32")
    query, key, value, at, scale, _, rotary = arguments
    short, _ = run(ROW, cache, (query, key, value, at, scale, None, rotary))
    long = {name: ops.pad(x, ((0, 0), (0, 0), (0, 4000), (0, 0))) for name, x in cache.items()}
    y, _ = run(ROW, long, (query, key, value, at, scale, None, rotary))
    assert relative_error(floats(y), floats(short)) < 1e-6


def test_refusals(rng):
    cache, (query, *_) = problem(rng, (1, 1, 8, 2, 64, 300, 200), "float32", "float32")
    facts = attention.Attention.of(cache, query)
    rows = {row.name: row for row in attention.TABLES[BACKEND]}
    assert rows[ROW].refuse(facts) is None
    only_cuda = [
        ({"head_dim": 6}, "heads of size 6"),
        ({"head_dim": 260}, "heads of size 260"),
        ({"device": "cpu"}, "not on a CUDA device"),
    ]
    for changes, reason in (
        ({"dtype": "float64"}, "queries of dtype float64"),
        ({"cache_dtype": "float64"}, "a cache of dtype float64"),
        ({"gradient": True}, "gradient"),
        *(only_cuda if GPU else [({"device": "cuda:0"}, "not on the CPU")]),
    ):
        assert reason in rows[ROW].refuse(dataclasses.replace(facts, **changes))


@pytest.mark.skipif(GPU, reason="of the native library")
@TOKENS
def test_every_instruction_set(tokens, rng):
    cache, arguments = problem(rng, (2, tokens, 12, 2, 100, 500, 434), "float32", "int8")
    y, _ = run(ROW, cache, arguments)
    try:
        for name in native.isas():
            native.set_isa(name)
            assert relative_error(floats(run(ROW, cache, arguments)[0]), floats(y)) < 1e-6, name
    finally:
        native.set_isa("auto")


@pytest.mark.skipif(GPU, reason="a GPU does not say that an index is out of range")
@pytest.mark.parametrize(("tokens", "index"), [(1, -1), (1, 300), (3, 298)])
def test_an_index_outside_the_cache_is_an_error(tokens, index, rng):
    cache, (query, key, value, _, *rest) = problem(
        rng, (1, tokens, 8, 2, 64, 300, 200), "float32", "float32"
    )
    at = ops.convert_to_tensor(index, "int32")
    with pytest.raises(Exception, match=rf"index must be in \[0, {300 - tokens}\]"):
        floats(run(ROW, cache, (query, key, value, at, *rest))[0])


def test_generation_takes_the_kernel(monkeypatch):
    keras.utils.set_random_seed(1)
    model = make_model(kernel_initializer=keras.initializers.RandomNormal(stddev=0.5))
    prompts, ran = [[3, 1, 4, 1, 5], [9, 2], [6]], []
    row = next(row for row in attention.TABLES[BACKEND] if row.name == ROW).load()
    counting = kernels.Kernel(ROW, row.refuse, lambda *a: ran.append(1) or row.run(*a))
    monkeypatch.setitem(attention.TABLES, BACKEND, (attention.REFERENCE,))
    wanted = model.generate(prompts, max_new_tokens=12)
    model.__dict__.pop("_programs")
    monkeypatch.setitem(attention.TABLES, BACKEND, (counting, attention.REFERENCE))
    for options in ({}, {"temperature": 1e-3, "seed": 1}, {"temperature": 1.0, "top_k": 1}):
        rows = model.generate(prompts, max_new_tokens=12, **options)
        assert_same_tokens(model, rows, wanted)
    assert ran
    beams = model.generate(prompts, max_new_tokens=6, beams=3)
    assert beams[1] == model.generate(prompts[1], max_new_tokens=6, beams=3)


@pytest.mark.skipif(BACKEND != "torch" or not GPU, reason="only a CUDA graph has one state")
def test_two_generations_at_once_are_told():
    model = make_model()
    first, second = (model.stream([1, 2, start], max_new_tokens=6) for start in (3, 4))
    for _ in range(2):  # the first token is the prompt's
        next(first), next(second)
    with pytest.raises(RuntimeError, match="Another generation"):
        list(first)
    assert len(list(second)) == 4
