import keras
import numpy as np
import pytest
from helpers import gradient, keras_3_15, relative_error, to_numpy
from keras import ops

from keras_bitnet import pack_model, summary
from keras_bitnet.layers import BitLayer, BitMultiHeadAttention, BitTransformerEncoder

NEW = keras_3_15("has no such argument")
FLIPS = 2e-2  # behind another quantized layer one code may be the next one
NAMES = ("query", "key", "value", "output", "gate")


def take_weights(layer, twin):
    for name in NAMES:
        if hasattr(twin, f"_{name}_dense"):
            getattr(layer, f"_{name}_dense").take_weights(getattr(twin, f"_{name}_dense"))


def quantize(layer, strength):
    for inner in layer._flatten_layers():
        if isinstance(inner, BitLayer):
            inner.quantization_strength.assign(strength)


def inputs_of(rng, *shapes):
    return [rng.normal(size=shape).astype("float32") for shape in shapes]


@pytest.mark.parametrize(
    ("arguments", "call"),
    [
        ({"value_dim": 5, "output_shape": 7}, {}),
        ({"use_bias": False}, {"use_causal_mask": True}),
        pytest.param({"value_dim": 3, "sliding_window": 2}, {}, marks=NEW),
        ({"value_dim": 3}, {"attention_mask": None, "use_causal_mask": True}),
        pytest.param({"output_shape": (2, 3), "use_gate": True}, {}, marks=NEW),
    ],
)
def test_strength_zero_is_its_keras_twin_and_strength_one_packs(arguments, call, rng):
    x, y, z = inputs_of(rng, (2, 4, 6), (2, 4, 8), (2, 4, 5))
    mask = np.tril(np.ones((2, 4, 4), bool))
    call = {"key": z, "attention_mask": mask, **call}
    twin = keras.layers.MultiHeadAttention(2, 4, bias_initializer="ones", **arguments)
    layer = BitMultiHeadAttention(2, 4, quantization_strength=0.0, weight_quantizer="int4",
                                  bias_initializer="ones", **arguments)  # fmt: skip
    # Without scores Keras's layer fails on JAX where value_dim is not key_dim.
    wanted = [to_numpy(v) for v in twin(x, y, **call, return_attention_scores=True)]
    layer.build(x.shape, y.shape, z.shape)
    take_weights(layer, twin)
    actual = layer(x, y, **call, return_attention_scores=True)
    for ours, theirs in zip(actual, wanted, strict=True):
        np.testing.assert_allclose(to_numpy(ours), theirs, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(to_numpy(layer(x, y, **call)), wanted[0], rtol=1e-4, atol=1e-5)
    quantize(layer, 1.0)
    y1 = to_numpy(layer(x, y, **call))
    packed = pack_model(layer, verbose=0)
    assert relative_error(to_numpy(packed(x, y, **call)), y1) < FLIPS
    assert relative_error(y1, wanted[0]) > 1e-3
    assert type(packed) is BitMultiHeadAttention
    assert type(layer).from_config(layer.get_config()).get_config() == layer.get_config()


def test_masks_of_the_inputs_act_as_in_keras():
    tokens = np.array([[1, 2, 0, 0], [3, 4, 5, 0]])
    embedding = keras.layers.Embedding(10, 6, mask_zero=True)
    twin = keras.layers.MultiHeadAttention(2, 4)
    layer = BitMultiHeadAttention(2, 4, quantization_strength=0.0)
    x = embedding(tokens)  # whose mask Keras takes away in the call
    wanted = twin(x, x, use_causal_mask=True)
    x = embedding(tokens)
    layer.build(x.shape, x.shape)
    take_weights(layer, twin)
    y = layer(x, x, use_causal_mask=True)
    np.testing.assert_allclose(to_numpy(y), to_numpy(wanted), rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(to_numpy(y._keras_mask), tokens != 0)


def test_sub_norm_makes_the_scale_of_the_values_not_matter(rng):
    (x,) = inputs_of(rng, (2, 4, 6))
    layer = BitMultiHeadAttention(2, 4, sub_norm="rms", use_bias=False, norm_epsilon=1e-12)
    y = to_numpy(layer(x, x))
    layer._value_dense.kernel.assign(4 * to_numpy(layer._value_dense.kernel))
    np.testing.assert_allclose(to_numpy(layer(x, x)), y, rtol=1e-3, atol=1e-4)
    assert layer._query_dense.normalization is None


def test_flash_attention_is_asked_for(rng):
    (x,) = inputs_of(rng, (2, 4, 6))
    layer = BitMultiHeadAttention(2, 4, flash_attention=True)
    layer.build(x.shape, x.shape)
    with pytest.raises(ValueError, match="flash attention"):
        layer(x, x, return_attention_scores=True)
    assert BitMultiHeadAttention.from_config(layer.get_config())._flash_attention


def hub_twin(layer, twin, x):
    """Brings the weights of a KerasHub block over."""
    layer.build(x.shape)
    take_weights(layer.attention, twin._self_attention_layer)
    layer.feed_forward.up_dense.take_weights(twin._feedforward_intermediate_dense)
    layer.feed_forward.down_dense.take_weights(twin._feedforward_output_dense)
    for norm, other in (
        (layer.attention_norm, twin._self_attention_layer_norm),
        (layer.feed_forward_norm, twin._feedforward_layer_norm),
    ):
        for target, source in zip(norm.weights, other.weights, strict=True):
            target.assign(source)


@pytest.mark.parametrize("normalize_first", [False, True])
def test_encoder_is_its_keras_hub_twin(normalize_first, rng):
    hub = pytest.importorskip("keras_hub")
    (x,) = inputs_of(rng, (2, 4, 6))
    arguments = {"activation": "gelu", "normalize_first": normalize_first,
                 "bias_initializer": "ones"}  # fmt: skip
    twin = hub.layers.TransformerEncoder(12, 2, **arguments)
    layer = BitTransformerEncoder(12, 2, quantization_strength=0.0, **arguments)
    masks = {"padding_mask": np.array([[1, 1, 1, 0], [1, 1, 0, 0]], bool),
             "attention_mask": np.tril(np.ones((2, 4, 4), bool))}  # fmt: skip
    wanted = [twin(x), twin(x, **masks)]
    hub_twin(layer, twin, x)
    for y, other in zip([layer(x), layer(x, **masks)], wanted, strict=True):
        np.testing.assert_allclose(to_numpy(y), to_numpy(other), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "arguments",
    [
        {"normalize_first": True, "norm": "rms", "sub_norm": "rms", "activation": "relu2"},
        {"stream_quantizer": "int8", "weight_quantizer": "int4", "projection_norm": "layer"},
    ],
)
def test_encoder_trains_packs_and_saves(arguments, rng, tmp_path):
    tokens = rng.integers(1, 20, (64, 6))
    tokens[:, 4:] = 0
    y = (tokens[:, 0] > 10).astype("float32")
    inputs = keras.Input((6,), dtype="int32")
    x = keras.layers.Embedding(20, 8, mask_zero=True)(inputs)
    x = BitTransformerEncoder(16, 2, name="block", **arguments)(x)
    outputs = keras.layers.Dense(1, activation="sigmoid")(x[:, 0])
    model = keras.Model(inputs, outputs)
    model.compile(keras.optimizers.Adam(0.02), "binary_crossentropy")
    losses = model.fit(tokens, y, epochs=10, batch_size=16, verbose=0).history["loss"]
    assert losses[-1] < 0.7 * losses[0]
    packed = pack_model(model, verbose=0)
    assert relative_error(to_numpy(packed(tokens)), to_numpy(model(tokens))) < FLIPS
    assert type(packed.get_layer("block")) is BitTransformerEncoder
    packed.save(tmp_path / "p.keras")
    again = keras.models.load_model(tmp_path / "p.keras")
    np.testing.assert_array_equal(to_numpy(again(tokens)), to_numpy(packed(tokens)))
    macs = [summary(m, as_data=True).totals for m in (model, packed)]
    assert macs[0].macs_by_precision == macs[1].macs_by_precision
    assert macs[0].bytes_packed == macs[1].bytes_stored
    assert not macs[0].not_counted


def test_encoder_gives_its_scores_in_a_functional_model():
    inputs = keras.Input((4, 8))
    outputs = BitTransformerEncoder(16, 2)(inputs, return_attention_scores=True)
    model = keras.Model(inputs, outputs)
    assert [y.shape for y in model.outputs] == [(None, 4, 8), (None, 2, 4, 4)]


def test_the_seed_of_an_encoder_decides_its_dropout(rng):
    (x,) = inputs_of(rng, (2, 4, 8))
    layers = [
        BitTransformerEncoder(16, 2, dropout=0.5, seed=seed, kernel_initializer="ones")
        for seed in (1, 1, 2)
    ]
    first, same, other = (to_numpy(layer(x, training=True)) for layer in layers)
    np.testing.assert_array_equal(first, same)
    assert np.abs(first - other).max() > 0.1
    assert layers[0].get_config()["seed"] == 1


def test_positional_arguments_are_those_of_keras():
    config = BitMultiHeadAttention(2, 4, 5, 0.1).get_config()
    assert (config["value_dim"], config["dropout"]) == (5, 0.1)


def test_gradient_flows_through_the_block(rng):
    (x,) = inputs_of(rng, (1, 3, 8))
    layer = BitTransformerEncoder(16, 2, normalize_first=True)
    layer.build(x.shape)
    slope = gradient(lambda v: ops.sum(layer(v) ** 2), x)
    assert np.isfinite(slope).all()
    assert (np.abs(slope) > 0).all()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        pytest.param(
            lambda: BitMultiHeadAttention(0, 4), "num_heads=0", marks=keras_3_15("takes 0 heads")
        ),
        (lambda: BitMultiHeadAttention(2, 4, sub_norm="batch"), "sub_norm='batch'"),
        (
            lambda: BitMultiHeadAttention(2, 4).build((2, 4, 6), (2, 4, 6), (2, 3, 6)),
            "must be equal",
        ),
        (lambda: BitTransformerEncoder(8, 0), "num_heads=0"),
        (lambda: BitTransformerEncoder(8, 2, norm="batch"), "norm='batch'"),
        (lambda: BitTransformerEncoder(8, 9).build((2, 4, 8)), "features=8, num_heads=9"),
    ],
)
def test_bad_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()
