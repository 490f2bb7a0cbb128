import keras
import numpy as np
import pytest
from helpers import mean_error, to_numpy
from rounding import clear_tokens

import keras_bitnet
from keras_bitnet.models import BitNetBackbone, BitNetCausalLM

SIZES = {
    "vocabulary_size": 50,
    "num_layers": 2,
    "num_query_heads": 4,
    "num_key_value_heads": 2,
    "hidden_dim": 32,
    "intermediate_dim": 48,
}
LLAMA = {"sub_norm": None, "activation": "silu", "tie_word_embeddings": False}


def make_model(**arguments):
    return BitNetCausalLM(BitNetBackbone(**{**SIZES, **arguments}))


def tokens(rng, batch=2, length=7):
    return rng.integers(0, SIZES["vocabulary_size"], (batch, length)).astype("int32")


def hugging_face_twin(model):
    """A transformers model with the float weights of ours, as FORMATS of both say."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    from transformers.integrations.bitnet import AutoBitLinear

    b = model.backbone
    common = {
        "vocab_size": b.vocabulary_size,
        "hidden_size": b.hidden_dim,
        "intermediate_size": b.intermediate_dim,
        "num_hidden_layers": b.num_layers,
        "num_attention_heads": b.num_query_heads,
        "num_key_value_heads": b.num_key_value_heads,
        "head_dim": b.head_dim,
        "rms_norm_eps": b.norm_epsilon,
        "tie_word_embeddings": b.tie_word_embeddings,
        "rope_parameters": {"rope_type": "default", "rope_theta": b.rope_max_wavelength},
    }
    kind = "BitNet" if b.sub_norm else "Llama"
    config = getattr(transformers, f"{kind}Config")(**common)
    twin = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    state = {}

    def put(name, value):
        state[name] = torch.tensor(np.ascontiguousarray(to_numpy(value)))

    put("model.embed_tokens.weight", b.token_embedding.embeddings)
    put("lm_head.weight", b.token_embedding.embeddings)
    if b.output_projection is not None:
        put("lm_head.weight", to_numpy(b.output_projection.kernel).T)
    put("model.norm.weight", b.layer_norm.scale)
    for i, layer in enumerate(b.decoder_layers):
        at, attention, ffn = f"model.layers.{i}", layer.attention, layer.feed_forward
        put(f"{at}.input_layernorm.weight", layer.attention_norm.scale)
        put(f"{at}.post_attention_layernorm.weight", layer.feed_forward_norm.scale)
        projections = {
            "self_attn.q": attention.query_dense,
            "self_attn.k": attention.key_dense,
            "self_attn.v": attention.value_dense,
            "self_attn.o": attention.output_dense,
            "mlp.gate": ffn.gate_dense,
            "mlp.up": ffn.up_dense,
            "mlp.down": ffn.down_dense,
        }
        for name, projection in projections.items():
            put(f"{at}.{name}_proj.weight", to_numpy(projection.kernel_matrix()).T)
        if b.sub_norm:
            put(f"{at}.self_attn.attn_sub_norm.weight", attention.output_dense.normalization.scale)
            put(f"{at}.mlp.ffn_sub_norm.weight", ffn.down_dense.normalization.scale)
    for name, module in list(twin.named_modules()):
        if name.endswith("_proj"):
            parent, _, child = name.rpartition(".")
            linear = AutoBitLinear(
                module.in_features, module.out_features, bias=False, online_quant=True
            )
            setattr(twin.get_submodule(parent), child, linear)
    twin.load_state_dict(state)
    return twin.float()


@pytest.mark.parametrize("arguments", [{}, LLAMA, {"head_dim": 16, **LLAMA}])
def test_logits_are_those_of_transformers(arguments, rng):
    model = make_model(**arguments)
    for variable in model.variables:  # norms that are all ones would hide a missing one
        if variable.name == "scale":
            variable.assign(rng.uniform(0.5, 1.5, variable.shape))
    twin = hugging_face_twin(model)
    import torch

    ids = clear_tokens(model)
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        wanted = twin(torch.tensor(ids).long()).logits.numpy()
    logits = to_numpy(model({"token_ids": ids, "padding_mask": np.ones_like(ids)}))
    np.testing.assert_allclose(logits, wanted, rtol=0, atol=1e-4)
    packed = keras_bitnet.pack_model(model, verbose=0)
    np.testing.assert_allclose(to_numpy(packed(ids)), wanted, rtol=0, atol=1e-4)


def test_padding_on_either_side_changes_nothing(rng):
    model = make_model()
    ids = tokens(rng, 1, 5)
    logits = to_numpy(model(ids))
    filler = tokens(rng, 1, 3)
    for side in ("left", "right"):
        parts = (filler, ids) if side == "left" else (ids, filler)
        mask = [np.zeros_like(p) if p is filler else np.ones_like(p) for p in parts]
        padded = {"token_ids": np.hstack(parts), "padding_mask": np.hstack(mask)}
        got = to_numpy(model(padded))
        got = got[:, 3:] if side == "left" else got[:, :5]
        assert mean_error(got, logits) < 2e-2


def test_the_smallest_memory_is_that_of_every_block(rng):
    model, ids = make_model(), tokens(rng)
    packed = [keras_bitnet.pack_model(model, memory=m, verbose=0) for m in ("fastest", "smallest")]
    layouts = [p.backbone.decoder_layers[1].feed_forward.down_dense.packed_layout for p in packed]
    assert layouts == ["tiles", "trits"]
    assert mean_error(*(to_numpy(p(ids)) for p in packed)) < 1e-5


@pytest.mark.parametrize("arguments", [{}, {"embedding_quantizer": "int8", **LLAMA}])
def test_fit_pack_save_load(arguments, tmp_path, rng):
    model = make_model(**arguments)
    model.compile(
        keras.optimizers.AdamW(0.02),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )
    ids = np.tile(np.arange(8, dtype="int32"), (16, 2)) + rng.integers(0, 9, (16, 1))
    data = {"token_ids": ids[:, :-1].astype("int32"), "padding_mask": np.ones((16, 15), bool)}
    losses = model.fit(data, ids[:, 1:], epochs=6, batch_size=8, verbose=0).history["loss"]
    assert losses[-1] < 0.8 * losses[0]
    logits = model.predict(data, verbose=0)
    packed = keras_bitnet.pack_model(model, verbose=0)
    assert type(packed) is BitNetCausalLM
    assert packed.packed
    kernels = [v.path for v in packed.variables if v.path.endswith("kernel")]
    assert not kernels
    assert mean_error(packed.predict(data, verbose=0), logits) < 1e-3
    packed.save(tmp_path / "packed.keras")
    loaded = keras.models.load_model(tmp_path / "packed.keras")
    assert mean_error(loaded.predict(data, verbose=0), logits) < 1e-3
    unpacked = keras_bitnet.unpack_model(loaded, verbose=0)
    assert not unpacked.packed
    assert mean_error(unpacked.predict(data, verbose=0), logits) < 1e-3


def test_presets_and_bad_arguments():
    config = keras_bitnet.models.PRESETS["bitnet_b1_58_2b_4t"]
    assert BitNetBackbone(**{**config, "num_layers": 1, "vocabulary_size": 8}, packed=True).packed
    with pytest.raises(ValueError, match="bitnet_b1_58_2b_4t"):
        BitNetBackbone.from_preset("gpt2")
    with pytest.raises(ValueError, match="vocabulary_size=0"):
        make_model(vocabulary_size=0)
    with pytest.raises(ValueError, match="token_ids"):
        make_model()({"ids": np.zeros((1, 3), "int32")})
    with pytest.raises(ValueError, match="BitNetBackbone"):
        BitNetCausalLM(keras.layers.Dense(3))


def test_gradients_of_a_frequent_token_add_up_in_float32():
    """4096 ones are 256 in bfloat16: 256 + 1 = 256."""
    backbone = BitNetBackbone(**SIZES, dtype="mixed_bfloat16")
    tokens = keras.Input((4096,), dtype="int32")
    x = backbone._embed(tokens)
    assert x.dtype == backbone.compute_dtype == "bfloat16"
    model = keras.Model(tokens, keras.ops.sum(keras.ops.cast(x, "float32"), axis=(1, 2)))
    model.compile(keras.optimizers.SGD(1.0), lambda _, found: keras.ops.sum(found))
    before = to_numpy(backbone.token_embedding.embeddings)[3]
    model.fit(np.full((1, 4096), 3), np.zeros(1), verbose=0)
    change = before - to_numpy(backbone.token_embedding.embeddings)[3]
    np.testing.assert_allclose(change, 4096, rtol=1e-6)
