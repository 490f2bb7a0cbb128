"""GGUF files: what goes out comes in again, and the gguf package reads the same weights."""

import os

import numpy as np
import pytest
from helpers import to_numpy

from keras_bitnet import quantizers
from keras_bitnet.interop import from_gguf, to_gguf, weights
from keras_bitnet.interop.from_gguf import read_arguments
from keras_bitnet.interop.gguf_file import GGUFFile
from keras_bitnet.interop.tensor_map import projections
from keras_bitnet.models import BitNetBackbone, BitNetCausalLM
from keras_bitnet.transforms import pack_model

gguf = pytest.importorskip("gguf")
TOKENS = np.array([[3, 1, 4, 1, 5, 9]])


def make_model(sub_norm=None, packed=True, hidden_dim=256, **changes):
    arguments = {
        "vocabulary_size": 40, "num_layers": 1, "num_query_heads": 4, "num_key_value_heads": 2,
        "hidden_dim": hidden_dim, "intermediate_dim": hidden_dim, "sub_norm": sub_norm,
        "activation": "silu", "tie_word_embeddings": True, "max_sequence_length": 64,
    }  # fmt: skip
    model = BitNetCausalLM(BitNetBackbone(**{**arguments, **changes}))
    return pack_model(model, verbose=0) if packed else model


def logits(model):
    return to_numpy(model({"token_ids": TOKENS, "padding_mask": np.ones_like(TOKENS)}))


TYPES = {
    "tq2_0": quantizers.Ternary(), "tq1_0": quantizers.Ternary(), "q2_0": quantizers.Ternary(),
    "i2_s": quantizers.Ternary(), "q1_0": quantizers.Binary(), "q4_0": quantizers.Int4(),
    "q8_0": quantizers.Int8("absmax", "tensor"),
}  # fmt: skip


@pytest.mark.parametrize("type", TYPES)
def test_packed_models_come_back_with_their_codes(type, tmp_path):
    sub_norm = "rms" if type in ("i2_s", "tq2_0") else None
    model = make_model(sub_norm, weight_quantizer=TYPES[type])
    to_gguf(model, tmp_path / "m.gguf", type=type, embedding_type="f32")
    again = from_gguf(tmp_path / "m.gguf")
    exact = TYPES[type].granularity == "tensor"
    for old, new in zip(projections(model.backbone), projections(again.backbone), strict=True):
        codes, scale, _ = weights.get_codes(old.layer)
        codes_again, scale_again, _ = weights.get_codes(new.layer)
        np.testing.assert_array_equal(codes_again, codes)
        np.testing.assert_allclose(scale_again, scale, rtol=1e-7 if exact else 1e-3)
    if exact:
        np.testing.assert_allclose(logits(again), logits(model), atol=2e-6, rtol=1e-5)


def test_heads_are_in_the_order_of_llama(tmp_path):
    """Rows 0, 1 of a head there are the rows 0 and half a head here."""
    model = make_model(weight_quantizer="ternary")
    to_gguf(model, tmp_path / "m.gguf")
    layer = model.backbone.decoder_layers[0].attention.query_dense
    codes = weights.get_codes(layer).codes  # heads of 64
    with GGUFFile(tmp_path / "m.gguf") as file:
        found, scale, _ = file.codes("blk.0.attn_q.weight", (256, 256))
        np.testing.assert_array_equal(found[0], codes[0])
        np.testing.assert_array_equal(found[1], codes[32])
        np.testing.assert_array_equal(found[64 + 2], codes[64 + 1])
        assert (scale == 1).all()
        apart = file.floats("blk.0.attn_q.scale", (1,))
        assert apart[0] == weights.get_codes(layer).scale.item()
        assert file.metadata["general.file_type"] == 37
        assert file.metadata["llama.attention.head_count_kv"] == 2


def test_the_gguf_package_reads_the_same_weights(tmp_path):
    model = make_model("rms", weight_quantizer=quantizers.Ternary(granularity="channel"))
    to_gguf(model, tmp_path / "m.gguf", type="tq2_0")
    reader = gguf.GGUFReader(tmp_path / "m.gguf")
    found = {tensor.name: tensor for tensor in reader.tensors}
    for place in projections(model.backbone):
        tensor = found[f"{place.gguf}.weight"]
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        expected = weights.get_matrix(place.layer)
        np.testing.assert_allclose(values, expected, rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize("type", ["f32", "q8_0"])
def test_float_models_go_out_and_come_in(type, tmp_path):
    model = make_model(packed=False, quantization_strength=0.0, tie_word_embeddings=False)
    to_gguf(model, tmp_path / "m.gguf", type=type, embedding_type="f32")
    again = from_gguf(tmp_path / "m.gguf", packed=False)
    atol = 1e-6 if type == "f32" else 0.05 * np.abs(logits(model)).max()
    np.testing.assert_allclose(logits(again), logits(model), atol=atol, rtol=1e-5)
    packed = from_gguf(tmp_path / "m.gguf", packed=True, weight_quantizer="int8")
    assert packed.packed


def test_two_bits_without_a_zero_fit_a_finer_grid(tmp_path):
    model = make_model(weight_quantizer="int2")
    with pytest.raises(ValueError, match=r"'q2_0' cannot hold the levels \[-1.5"):
        to_gguf(model, tmp_path / "m.gguf", type="q2_0")
    to_gguf(model, tmp_path / "m.gguf", type="q4_0", embedding_type="f32")
    again = from_gguf(tmp_path / "m.gguf")
    for old, new in zip(projections(model.backbone), projections(again.backbone), strict=True):
        expected = weights.get_matrix(old.layer)
        np.testing.assert_allclose(weights.get_matrix(new.layer), expected, rtol=1e-3)


@pytest.mark.parametrize(
    ("model", "arguments", "message"),
    [
        ({"weight_quantizer": "int4"}, {"type": "tq2_0"}, "cannot hold the levels"),
        ({"hidden_dim": 160}, {"type": "tq2_0"}, "multiple of 256 inputs. Received: 160"),
        ({"weight_quantizer": quantizers.Ternary(group_size=64)}, {}, "a scale for every 64"),
        ({"packed": False, "quantization_strength": 0.0}, {}, "is float"),
        ({"packed": False, "quantization_strength": 0.5}, {}, "half quantized"),
        ({"activation": "relu2"}, {}, "SiLU gates"),
        ({}, {"arch": "bitnet"}, "one without is 'llama'"),
        ({"sub_norm": "rms", "tie_word_embeddings": False}, {}, "tied embeddings only"),
        ({}, {"type": "q3_k"}, "`type` must be one of"),
    ],
)
def test_what_does_not_fit_is_refused_before_a_file_is_there(model, arguments, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        to_gguf(make_model(**model), tmp_path / "m.gguf", **arguments)
    assert not list(tmp_path.iterdir())


def test_readers_that_compute_something_else_are_named(tmp_path):
    model = make_model("rms", activation="relu2")
    with pytest.warns(UserWarning, match="llama.cpp computes SiLU gates"):
        to_gguf(model, tmp_path / "m.gguf")
    to_gguf(model, tmp_path / "m.gguf", type="i2_s", embedding_type="f32")
    with GGUFFile(tmp_path / "m.gguf") as file:
        assert file.metadata["general.architecture"] == "bitnet-b1.58"
    again = from_gguf(tmp_path / "m.gguf")
    np.testing.assert_allclose(logits(again), logits(model), rtol=1e-5, atol=1e-6)


def test_llama_cpp_gives_the_same_logits(tmp_path):
    llama_cpp = pytest.importorskip("llama_cpp", reason="built from source: optional")
    for sub_norm, type in ((None, "tq2_0"), (None, "tq1_0"), ("rms", "tq2_0"), (None, "f32")):
        model = make_model(sub_norm, weight_quantizer="ternary")
        path = os.fspath(tmp_path / "m.gguf")
        to_gguf(model, path, type=type, embedding_type="f32")
        theirs = llama_cpp.Llama(path, n_ctx=32, logits_all=True, verbose=False, n_threads=1)
        theirs.eval(TOKENS[0].tolist())
        found, expected = np.array(theirs.scores[:6]), logits(model)[0]
        assert (found.argmax(-1) == expected.argmax(-1)).all()
        assert np.corrcoef(found.reshape(-1), expected.reshape(-1))[0, 1] > 0.999


def test_biases_and_partial_rotation_are_refused(tmp_path):
    to_gguf(make_model(weight_quantizer="ternary"), tmp_path / "m.gguf")
    with GGUFFile(tmp_path / "m.gguf") as file:
        heads = file.metadata["llama.rope.dimension_count"]
        file.metadata["llama.rope.dimension_count"] = heads // 2
        with pytest.raises(ValueError, match=f"whole heads of {heads}. Received: .*={heads // 2}"):
            read_arguments(file, file.metadata["general.architecture"])
        del file.metadata["llama.rope.dimension_count"]
        file.tensors["blk.0.attn_q.bias"] = file.info("output_norm.weight")
        with pytest.raises(ValueError, match=r"biases.*blk\.0\.attn_q\.bias"):
            read_arguments(file, file.metadata["general.architecture"])
