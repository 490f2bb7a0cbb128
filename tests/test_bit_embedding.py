import keras
import numpy as np
import pytest
from helpers import BACKEND, KERAS, gradient, packed_twin, relative_error, to_numpy
from keras import ops

import keras_bitnet
from keras_bitnet import pack_model, quantize_model, quantizers
from keras_bitnet.layers import BitEmbedding, BitLayer, ReversibleBitEmbedding
from keras_bitnet.ops import PackedTensor, layout
from keras_bitnet.quantizers import Int4, Ternary

TOKENS = np.array([[0, 1, 15, 16], [17, 36, 36, 3]])
EVERY_WIDTH = [
    *("binary", "ternary", "int2", "int4", "int8"),
    Ternary(granularity="channel"),
    Int4(group_size=32, scale="learned"),
]


@pytest.mark.parametrize("bits", layout.BITS)
def test_gather_reads_the_columns(bits, rng):
    codes = rng.integers(0, 2**bits, (70, 37)).astype("uint8")
    tiles = ops.convert_to_tensor(layout.pack(codes, bits))
    rows = to_numpy(layout.gather(tiles, TOKENS, bits, 70, 37))
    np.testing.assert_array_equal(rows, codes.T[TOKENS])


@pytest.mark.parametrize("quantizer", EVERY_WIDTH, ids=str)
def test_lookup_is_the_quantized_table_and_its_packed_twin(quantizer):
    layer = BitEmbedding(37, 70, weight_quantizer=quantizer)
    y = to_numpy(layer(TOKENS))
    quantized = layer.weight_quantizer.dequantize(layer.quantized_matrix())
    assert relative_error(y, to_numpy(quantized).T[TOKENS]) < 1e-6
    packed = packed_twin(layer, None)
    assert packed.kernel_tiles.shape == layout.tiles_shape(70, 37, layer.weight_quantizer.bits)
    assert relative_error(to_numpy(packed(TOKENS)), y) < 1e-6
    rows = ops.vectorized_map(packed, ops.convert_to_tensor(TOKENS))
    assert relative_error(to_numpy(rows), y) < 1e-6


def test_strength_zero_is_embedding():
    twin = keras.layers.Embedding(37, 8, mask_zero=True)
    wanted = twin(TOKENS)
    layer = BitEmbedding(37, 8, mask_zero=True, quantization_strength=0.0)
    layer.build(None)
    layer.take_weights(twin)
    y = layer(TOKENS)
    np.testing.assert_array_equal(to_numpy(y), to_numpy(wanted))
    np.testing.assert_array_equal(to_numpy(y._keras_mask), to_numpy(wanted._keras_mask))
    for dtype in ("float32", "uint8", "int64"):
        np.testing.assert_array_equal(to_numpy(layer(TOKENS.astype(dtype))), to_numpy(wanted))
    keras.utils.set_random_seed(1)
    first = keras.layers.Embedding(5, 3)
    first.build()
    keras.utils.set_random_seed(1)
    second = BitEmbedding(5, 3)
    second.build(None)
    np.testing.assert_array_equal(to_numpy(second.kernel), to_numpy(first.embeddings))


def test_gradient_reaches_the_rows_that_were_looked_up(rng):
    layer = BitEmbedding(37, 8)
    layer.build(None)
    table = to_numpy(layer.kernel)
    ahead = rng.normal(size=(2, 4, 8)).astype("float32")

    def loss(kernel):
        fake = layer.weight_quantizer.fake_quantize(layer.kernel_to_matrix(kernel))
        return ops.sum(ops.take(ops.transpose(fake), TOKENS, axis=0) * ops.convert_to_tensor(ahead))

    wanted = np.zeros_like(table)
    np.add.at(wanted, TOKENS, ahead)
    np.testing.assert_allclose(gradient(loss, table), wanted, rtol=1e-5, atol=1e-6)
    model = keras.Sequential([keras.Input((4,), dtype="int32"), layer])
    model.compile(keras.optimizers.SGD(1.0), "mse")
    model.fit(TOKENS, ahead, batch_size=2, epochs=1, verbose=0)
    moved = np.flatnonzero(np.abs(to_numpy(layer.kernel) - table).max(axis=1))
    assert set(moved) == set(TOKENS.ravel())


@pytest.mark.parametrize("tie_weights", [True, False])
def test_reversible_is_its_keras_twin_and_packs(tie_weights, rng, tmp_path):
    arguments = {"tie_weights": tie_weights, "logit_soft_cap": 3.0, "mask_zero": True}
    twin = keras.layers.ReversibleEmbedding(37, 40, **arguments)
    twin.build()
    layer = ReversibleBitEmbedding(
        37, 40, weight_quantizer="int4", quantization_strength=0.0, **arguments
    )
    layer.build(None)
    layer.take_weights(twin)
    assert layer.mask_zero == twin.mask_zero
    x = rng.normal(size=(2, 4, 40)).astype("float32")
    for inputs, reverse in ((TOKENS, False), (x, True)):
        y, wanted = layer(inputs, reverse=reverse), twin(inputs, reverse=reverse)
        np.testing.assert_allclose(to_numpy(y), to_numpy(wanted), rtol=1e-5, atol=1e-6)
        masks = getattr(y, "_keras_mask", None), getattr(wanted, "_keras_mask", None)
        if KERAS >= (3, 14) or not reverse:  # before, Keras masked what it read in reverse
            assert (masks[0] is None) == (masks[1] is None)

    tokens = keras.Input((4,), dtype="int32")
    model = keras.Model(
        tokens, layer(keras.layers.LayerNormalization()(layer(tokens)), reverse=True)
    )
    for inner in layer._flatten_layers(recursive=True):
        if isinstance(inner, BitLayer):
            inner.quantization_strength.assign(1.0)
    wanted = to_numpy(model(TOKENS))
    packed = pack_model(model, verbose=0)
    assert relative_error(to_numpy(packed(TOKENS)), wanted) < 2e-2  # behind a norm codes may flip
    tables = [layer for layer in packed._flatten_layers() if isinstance(layer, BitLayer)]
    assert [table.packed for table in tables] == [True] * (1 if tie_weights else 2)
    packed.save(tmp_path / "p.keras")
    again = keras.models.load_model(tmp_path / "p.keras")
    np.testing.assert_array_equal(to_numpy(again(TOKENS)), to_numpy(packed(TOKENS)))
    assert sum(v.dtype == "uint8" for v in again.variables) == len(tables)


def test_reverse_dtype_and_lower_precision():
    layer = ReversibleBitEmbedding(37, 8, dtype="mixed_bfloat16", reverse_dtype="float32")
    y = layer(TOKENS)
    assert keras.backend.standardize_dtype(y.dtype) == "bfloat16"
    logits = layer(y, reverse=True)
    assert keras.backend.standardize_dtype(logits.dtype) == "float32"
    assert layer.compute_output_shape((2, 4)) == (2, 4, 8)
    assert layer.compute_output_shape((2, 4, 8), reverse=True) == (2, 4, 37)


@pytest.mark.parametrize("packed", [False, True])
def test_lora(packed, rng):
    layer = BitEmbedding(37, 6)
    before = to_numpy(layer(TOKENS))
    layer = packed_twin(layer, None) if packed else layer
    layer.enable_lora(2, lora_alpha=4)
    layer.lora_kernel_b.assign(rng.normal(size=(2, 37)))
    low_rank = 2 * to_numpy(layer.lora_kernel_a) @ to_numpy(layer.lora_kernel_b)
    assert relative_error(to_numpy(layer(TOKENS)), before + low_rank.T[TOKENS]) < 1e-5
    assert relative_error(to_numpy(layer.embeddings)[TOKENS], before + low_rank.T[TOKENS]) < 1e-5


@keras.saving.register_keras_serializable("tests")
class Tied(keras.layers.Layer):
    """Reads the table of a layer inside, as layers written for Keras's embeddings do."""

    def __init__(self, reversible, **kwargs):
        super().__init__(**kwargs)
        self.reversible = reversible
        kind = keras.layers.ReversibleEmbedding if reversible else keras.layers.Embedding
        self.embedding = kind(37, 8)

    def build(self, input_shape):
        self.embedding.build(input_shape)

    def call(self, tokens):
        return ops.matmul(self.embedding(tokens), ops.transpose(self.embedding.embeddings))

    def get_config(self):
        return {**super().get_config(), "reversible": self.reversible}


@pytest.mark.parametrize("reversible", [False, True])
def test_a_layer_that_reads_the_table_works_converted_and_packed(reversible):
    model = keras.Sequential([keras.Input((4,), dtype="int32"), Tied(reversible)])
    spec = {"weight_quantizer": "int8", "quantization_strength": 0.0}
    converted = quantize_model(model, spec, verbose=0)
    np.testing.assert_allclose(to_numpy(converted(TOKENS)), to_numpy(model(TOKENS)), atol=1e-6)
    packed = pack_model(quantize_model(model, "int8", verbose=0), verbose=0)
    np.testing.assert_allclose(to_numpy(packed(TOKENS)), to_numpy(model(TOKENS)), atol=1e-4)


@pytest.mark.parametrize("kind", [BitEmbedding, ReversibleBitEmbedding])
def test_files_are_written_and_read_without_the_table(kind, tmp_path, monkeypatch):
    """It may be larger than all else together: 1.3 GB beside a packed model of 0.75 GB."""
    model = pack_model(keras.Sequential([keras.Input((4,), dtype="int32"), kind(37, 8)]), verbose=0)
    read = []
    monkeypatch.setattr(kind, "embeddings", property(lambda layer: read.append(layer)))
    model.save(tmp_path / "model.keras")
    keras.models.load_model(tmp_path / "model.keras")
    assert not read


def test_quantize_model_takes_embeddings_and_leaves_out_what_they_do_not_have():
    class Inherited(keras.layers.Embedding):
        pass

    class Changed(keras.layers.Embedding):
        def call(self, inputs):
            return 2 * super().call(inputs)

    tokens = keras.Input((4,), dtype="int32")
    parts = [Inherited(37, 8, name="a")(tokens), Changed(37, 8, name="b")(tokens)]
    model = keras.Model(tokens, keras.layers.Dense(37)(keras.layers.Add()(parts)))
    spec = {"weight_quantizer": "int8", "norm": "rms", "quantization_strength": 0.0}
    new = quantize_model(model, spec, filters="^[ab]$", verbose=0)
    assert type(new.get_layer("a")) is BitEmbedding
    assert type(new.get_layer("b")) is Changed
    np.testing.assert_allclose(to_numpy(new(TOKENS)), to_numpy(model(TOKENS)), atol=1e-6)


def test_summary_counts_the_packed_bytes_and_no_product_of_a_lookup():
    layer = ReversibleBitEmbedding(100, 40, name="tokens")
    tokens = keras.Input((4,), dtype="int32")
    model = keras.Model(tokens, layer(layer(tokens), reverse=True))
    data = keras_bitnet.summary(model, as_data=True)
    assert data.totals.macs_by_precision == {"W1.58A8": 4 * 100 * 40}
    packed = pack_model(model, verbose=0)
    assert data.totals.bytes_packed == sum(np.prod(v.shape) * (1 if v.dtype == "uint8" else 4)
                                           for v in packed.variables)  # fmt: skip


def test_weights_and_config_round_trip(rng):
    table = rng.normal(size=(5, 3))
    layer = BitEmbedding(5, 3, weights=table, quantization_strength=0.0, name="here",
                         embeddings_regularizer="l2", weight_quantizer="int4")  # fmt: skip
    np.testing.assert_allclose(to_numpy(layer(np.arange(5))), table, rtol=1e-6)
    for made in (layer, ReversibleBitEmbedding(5, 3, False, reverse_dtype="float32")):
        config = made.get_config()
        assert not any("norm" in key for key in config)
        assert type(made).from_config(config).get_config() == config


@pytest.mark.parametrize("packed", [False, True])
def test_token_out_of_range_is_no_silent_garbage(packed):
    if BACKEND == "torch" and ops.zeros(1).is_cuda:
        pytest.skip("an index out of range ends all work of PyTorch on that GPU")
    layer = BitEmbedding(37, 8)
    layer.build(None)
    layer = packed_twin(layer, None) if packed else layer
    tokens = np.array([[37, 40]])
    if BACKEND == "jax":
        assert np.isnan(to_numpy(layer(tokens))).all()
    else:  # the error of the backend, as for `keras.layers.Embedding`
        with pytest.raises(
            Exception, match=r"index out of range|out of DATA bounds|not in \[0, 37"
        ):
            layer(tokens)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: BitEmbedding(0, 4), "Received: input_dim=0"),
        (lambda: BitEmbedding(4, 2.5), "Received: output_dim=2.5"),
        (lambda: BitEmbedding(4, 4, norm="rms"), "BitEmbedding has no `norm`"),
        (lambda: ReversibleBitEmbedding(4, 4, projection_norm="rms"), "has no `projection_norm`"),
        (lambda: BitEmbedding(4, 4, activation="relu"), "has no `activation`"),
        (lambda: BitEmbedding(4, 4, weights=np.zeros((4, 3))), "shape"),
    ],
)
def test_bad_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_packed_tensor_gathers_grouped_scales(rng):
    q = quantizers.Int4(group_size=32)
    w = rng.normal(size=(70, 37)).astype("float32")
    codes, scale, offset = q.quantize(w)
    packed = PackedTensor.from_codes(codes, scale, offset, q.bits, q.group_size)
    wanted = to_numpy(packed.dequantize()).T[TOKENS]
    np.testing.assert_allclose(to_numpy(packed.gather(TOKENS)), wanted, rtol=1e-6)
