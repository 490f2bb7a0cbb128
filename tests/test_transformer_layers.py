import keras
import numpy as np
import pytest
from helpers import BACKEND, keras_3_15, mean_error, no_gradient, relative_error, to_numpy
from keras import ops

import keras_bitnet
from keras_bitnet.layers import (
    BitFeedForward,
    BitGroupedQueryAttention,
    BitTransformerDecoder,
    make_cache,
)


def attention_twins(**arguments):
    """Keras's layer and ours at strength 0, with the same weights."""
    stock = keras.layers.GroupQueryAttention(8, 4, 2, bias_initializer="random_normal", **arguments)
    ours = BitGroupedQueryAttention(8, 4, 2, quantization_strength=0.0, **arguments)
    for layer in (stock, ours):
        layer.build((None, None, 24), (None, None, 24))
    for name in ("query", "key", "value", "gate", "output"):
        old = getattr(stock, f"_{name}_dense", None)
        if old is not None:
            getattr(ours, f"{name}_dense").kernel.assign(old.kernel)
            getattr(ours, f"{name}_dense").bias.assign(old.bias)
    return stock, ours


MASK = np.tril(np.ones((2, 5, 5), bool))
X = np.ones((1, 3, 24), "float32")
PADDING = np.array([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]], bool)


NEW = keras_3_15("has no such argument")


@pytest.mark.parametrize(
    ("arguments", "call"),
    [
        ({}, {}),
        ({}, {"use_causal_mask": True}),
        pytest.param(
            {"use_gate": True}, {"value_mask": PADDING, "use_causal_mask": True}, marks=NEW
        ),
        pytest.param({"sliding_window": 2}, {"use_causal_mask": True}, marks=NEW),
        ({}, {"attention_mask": MASK, "return_attention_scores": True}),
        ({}, {"use_causal_mask": True, "return_attention_scores": True}),
    ],
)
def test_attention_at_strength_zero_is_that_of_keras(arguments, call, rng):
    stock, ours = attention_twins(**arguments)
    x = rng.normal(size=(2, 5, 24)).astype("float32")
    wanted, got = stock(x, x, **call), ours(x, x, **call)
    for w, g in zip(keras.tree.flatten(wanted), keras.tree.flatten(got), strict=True):
        np.testing.assert_allclose(to_numpy(g), to_numpy(w), rtol=1e-4, atol=1e-5)


def test_attention_cross_and_dropout(rng):
    stock, ours = attention_twins()
    query = rng.normal(size=(2, 3, 24)).astype("float32")
    value = rng.normal(size=(2, 5, 24)).astype("float32")
    got = ours(query, value, key=value * 2)
    np.testing.assert_allclose(
        to_numpy(got), to_numpy(stock(query, value, key=value * 2)), rtol=1e-4, atol=1e-5
    )
    layer = BitGroupedQueryAttention(8, 4, 2, dropout=0.5, seed=1)
    first, second = (to_numpy(layer(query, query, training=True)) for _ in range(2))
    assert np.abs(first - second).max() > 1e-3
    np.testing.assert_array_equal(
        to_numpy(layer(query, query)), to_numpy(layer(query, query, training=False))
    )


def test_rotary_depends_on_distance_alone(rng):
    layer = BitGroupedQueryAttention(8, 4, 2, rope_max_wavelength=100.0, quantization_strength=0.0)
    x = rng.normal(size=(1, 6, 24)).astype("float32")
    y = to_numpy(layer(x, x, use_causal_mask=True))
    moved = to_numpy(layer(x, x, use_causal_mask=True, positions=np.arange(6)[None] + 7))
    np.testing.assert_allclose(moved, y, rtol=1e-4, atol=1e-5)
    stretched = to_numpy(layer(x, x, use_causal_mask=True, positions=2 * np.arange(6)[None]))
    assert relative_error(stretched, y) > 1e-3


def test_rotary_turns_halves():
    layer = BitGroupedQueryAttention(4, 1, 1, rope_max_wavelength=100.0)
    cos, sin = (to_numpy(t)[0, 0, 0] for t in layer.rotary_tables(np.array([[3]])))
    angles = np.array([3.0, 0.3, 3.0, 0.3])
    np.testing.assert_allclose(cos, np.cos(angles), rtol=1e-5)
    np.testing.assert_allclose(sin, np.sin(angles), rtol=1e-5)


@pytest.mark.parametrize(
    ("activation", "gated", "function"),
    [
        ("relu2", True, lambda x: np.maximum(x, 0) ** 2),
        ("silu", True, lambda x: x / (1 + np.exp(-x))),
        ("relu2", False, lambda x: np.maximum(x, 0) ** 2),
    ],
)
def test_feed_forward_formula(activation, gated, function, rng):
    layer = BitFeedForward(20, activation, gated, sub_norm="rms", quantization_strength=0.0)
    x = rng.normal(size=(2, 3, 8)).astype("float32")
    y = to_numpy(layer(x))
    kernels = {d.name: to_numpy(d.kernel) for d in layer._layers if hasattr(d, "kernel")}
    z = (
        function(x @ kernels["gate"]) * (x @ kernels["up"])
        if gated
        else function(x @ kernels["up"])
    )
    z = z / np.sqrt((z * z).mean(-1, keepdims=True) + 1e-5)
    assert relative_error(y, z @ kernels["down"]) < 1e-5


@pytest.mark.parametrize("cache_dtype", ["float32", "int8"])
@pytest.mark.parametrize("sliding_window", [None, 3])
def test_decoding_with_a_cache_equals_the_whole(cache_dtype, sliding_window, rng):
    block = BitTransformerDecoder(20, 4, 2, sliding_window=sliding_window)
    x = rng.normal(size=(2, 7, 16)).astype("float32")
    wanted = to_numpy(block(x))
    cache = make_cache(2, 9, 2, 4, cache_dtype)
    with no_gradient():
        y, cache = block(x[:, :4], cache=cache, cache_index=0)
        parts = [to_numpy(y)]
        for i in range(4, 7):
            y, cache = block(x[:, i : i + 1], cache=cache, cache_index=i)
            parts.append(to_numpy(y))
    error = relative_error(np.concatenate(parts, 1), wanted)
    assert error < (1e-4 if cache_dtype == "float32" else 0.05)


def test_padding_does_not_reach_other_tokens(rng):
    block = BitTransformerDecoder(20, 4, 2)
    x = rng.normal(size=(2, 5, 16)).astype("float32")
    mask = np.array([[0, 0, 1, 1, 1], [1, 1, 1, 1, 0]], bool)
    y = to_numpy(block(x, padding_mask=mask))
    changed = np.where(mask[..., None], x, 5 * x + 1).astype("float32")
    again = to_numpy(block(changed, padding_mask=mask))
    np.testing.assert_allclose(again[mask], y[mask], rtol=1e-5, atol=1e-6)


def model_with_blocks(**arguments):
    inputs = keras.Input((None, 16))
    x = BitTransformerDecoder(20, 4, 2, **arguments)(inputs)
    x = BitTransformerDecoder(20, 4, norm="layer", sub_norm=None, activation="gelu", gated=False)(x)
    return keras.Model(inputs, BitFeedForward(24, "silu", use_bias=True, dropout=0.1)(x))


def test_trains_packs_saves_and_unpacks(tmp_path, rng):
    x = rng.normal(size=(32, 6, 16)).astype("float32")
    model = model_with_blocks()
    model.compile(keras.optimizers.Adam(0.01), "mse")
    losses = model.fit(x, np.roll(x, 1, 1) * 0.5, epochs=3, batch_size=16, verbose=0).history[
        "loss"
    ]
    assert losses[-1] < losses[0]
    y = model.predict(x, verbose=0)
    packed = keras_bitnet.pack_model(model, verbose=0)
    assert packed.layers[1].attention.query_dense.packed
    assert packed.layers[1].attention.query_dense.kernel is None
    assert mean_error(packed.predict(x, verbose=0), y) < 1e-3
    packed.save(tmp_path / "m.keras")
    loaded = keras.models.load_model(tmp_path / "m.keras")
    assert mean_error(loaded.predict(x, verbose=0), y) < 1e-3
    unpacked = keras_bitnet.unpack_model(loaded, verbose=0)
    assert unpacked.layers[1].feed_forward.up_dense.kernel is not None
    assert mean_error(unpacked.predict(x, verbose=0), y) < 1e-3


def test_lora_inside_a_block_survives_packing(rng):
    x = rng.normal(size=(4, 6, 16)).astype("float32")
    model = model_with_blocks()
    query = model.layers[1].attention.query_dense
    query.enable_lora(2, b_initializer="random_normal")
    y = model.predict(x, verbose=0)
    packed = keras_bitnet.pack_model(model, verbose=0)
    assert packed.layers[1].attention.query_dense.lora_enabled
    assert mean_error(packed.predict(x, verbose=0), y) < 1e-3


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: BitGroupedQueryAttention(8, 4, 3), "multiple of"),
        (lambda: BitGroupedQueryAttention(0, 4, 2), "head_dim=0"),
        (lambda: BitGroupedQueryAttention(7, 4, 2, rope_max_wavelength=10.0), "even"),
        (lambda: BitGroupedQueryAttention(8, 4, 2, sliding_window=0), "sliding_window=0"),
        (lambda: BitGroupedQueryAttention(8, 4, 2, dropout=0.1, flash_attention=True), "dropout"),
        (lambda: BitFeedForward(0), "intermediate_dim=0"),
        (lambda: BitFeedForward(8, sub_norm="batch"), "sub_norm"),
        (lambda: BitFeedForward(8, dtype="int8_from_float32"), "dtype=int8_from_float32"),
        (
            lambda: BitGroupedQueryAttention(8, 4, 2)(
                X, X, return_attention_scores=True, cache=make_cache(1, 4, 2, 8), cache_index=0
            ),
            "does not go with a `cache`",
        ),
        (lambda: BitTransformerDecoder(8, 3).build((None, None, 16)), "features=16"),
        (lambda: BitTransformerDecoder(8, 3, norm=None), "norm=None"),
        (lambda: BitTransformerDecoder(8, 0), "num_query_heads=0"),
        (lambda: make_cache(1, 2, 3, 4, "int32"), "dtype='int32'"),
    ],
)
def test_bad_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_scores_and_caches_in_a_functional_model():
    x = keras.Input((3, 24), batch_size=1)
    attention = BitGroupedQueryAttention(8, 4, 2)
    cache = make_cache(1, 8, 4, 6)
    given = {name: keras.Input(batch_shape=buffer.shape) for name, buffer in cache.items()}
    outputs = {
        "scores": attention(x, x, return_attention_scores=True),
        "decoded": BitTransformerDecoder(8, 4)(x, cache=given, cache_index=2),
    }
    model = keras.Model([x, given], outputs)
    shapes = keras.tree.map_structure(
        lambda y: tuple(y.shape), model([ops.convert_to_tensor(X), cache])
    )
    assert shapes == keras.tree.map_structure(lambda y: tuple(y.shape), outputs)
    assert [*map(tuple, shapes["scores"])] == [(1, 3, 24), (1, 4, 3, 3)]
    assert shapes["decoded"][1]["key"] == (1, 4, 8, 6)


def test_jit_and_dynamic_length(rng):
    model = model_with_blocks(rope_max_wavelength=500.0)
    for jit_compile in (BACKEND != "torch", False):  # torch.compile takes a minute for this
        model.compile(jit_compile=jit_compile)
        for length in (3, 5):
            x = rng.normal(size=(2, length, 16)).astype("float32")
            np.testing.assert_allclose(
                model.predict(x, verbose=0), to_numpy(model(ops.convert_to_tensor(x))), atol=1e-2
            )
