"""Checkpoints against transformers: the same logits, in and out, and the same bytes."""

import json
import warnings

import numpy as np
import pytest
from helpers import needs, relative_error, to_numpy
from rounding import clear_tokens

from keras_bitnet.interop import from_hugging_face, to_hugging_face
from keras_bitnet.interop.safetensors_file import Checkpoint

pytestmark = needs("torch", "transformers", "accelerate")

SIZES = {
    "vocab_size": 56, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
    "initializer_range": 0.5,
}  # fmt: skip
KINDS = {
    "bitnet": ("BitNetConfig", {"tie_word_embeddings": True}),
    "llama": ("LlamaConfig", {"tie_word_embeddings": False, "head_dim": 10}),
}
QUANTIZATION = {
    "online": {"linear_class": "autobitlinear", "quantization_mode": "online"},
    "offline": {"linear_class": "autobitlinear", "quantization_mode": "offline"},
    "bitlinear": {},
    "float": None,
}
SAME = 1e-4  # largest difference of a logit


def make_checkpoint(folder, kind, variant, **changes):
    """A checkpoint of random weights, written by the other side's own code."""
    import torch
    import transformers
    from safetensors.torch import save_file
    from transformers.integrations.bitnet import pack_weights

    config_class, more = KINDS[kind]
    config = getattr(transformers, config_class)(**{**SIZES, **more, **changes})
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.data = 1 + 0.3 * torch.randn_like(parameter)
    tensors = dict(model.state_dict())
    if config.tie_word_embeddings:
        del tensors["lm_head.weight"]
    if variant in ("offline", "bitlinear"):
        for name in [name for name in tensors if name.endswith("proj.weight")]:
            mean = tensors[name].abs().mean()
            ternary = torch.clamp(torch.round(tensors[name] / mean), -1, 1)
            tensors[name] = pack_weights(ternary)
            scale = mean if variant == "offline" else 1 / mean
            tensors[name + "_scale"] = scale.reshape(1)
    model.config.save_pretrained(folder)
    save_file({k: v.contiguous() for k, v in tensors.items()}, folder / "model.safetensors")
    written = json.loads((folder / "config.json").read_text())
    if QUANTIZATION[variant] is not None:
        written["quantization_config"] = {"quant_method": "bitnet", **QUANTIZATION[variant]}
        (folder / "config.json").write_text(json.dumps(written))
    return folder


def their_logits(folder, tokens):
    import torch
    import transformers

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    # Eager: compiling their rounding takes longer than all the rest.
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        return model.eval()(torch.tensor(tokens).long()).logits.numpy()


def our_logits(model, tokens):
    return to_numpy(model({"token_ids": tokens, "padding_mask": np.ones_like(tokens)}))


def assert_same_logits(found, expected):
    assert np.abs(expected).max() > 1
    np.testing.assert_allclose(found, expected, rtol=0, atol=SAME)


@pytest.mark.parametrize("variant", QUANTIZATION)
@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_those_of_transformers_in_and_out(kind, variant, tmp_path):
    (tmp_path / "in").mkdir()
    folder = make_checkpoint(tmp_path / "in", kind, variant)
    model = from_hugging_face(folder)
    assert model.packed == (variant in ("offline", "bitlinear"))
    tokens = clear_tokens(model)
    expected = their_logits(folder, tokens)
    assert_same_logits(our_logits(model, tokens), expected)
    to_hugging_face(model, tmp_path / "out", variant=variant)
    assert_same_logits(their_logits(tmp_path / "out", tokens), expected)
    with Checkpoint(folder) as before, Checkpoint(tmp_path / "out") as after:
        assert before.keys() == after.keys()
        for name in before.keys():  # noqa: SIM118
            given = before.read(name, before.shape(name), [before.dtype(name)])
            written = after.read(name, before.shape(name), [before.dtype(name)])
            assert relative_error(written, given) <= (0 if given.dtype == np.uint8 else 2e-7), name


def test_variants_turn_into_each_other_with_the_same_bytes(tmp_path):
    (tmp_path / "in").mkdir()
    model = from_hugging_face(make_checkpoint(tmp_path / "in", "bitnet", "offline"))
    to_hugging_face(model, tmp_path / "c", variant="bitlinear", shard_bytes=4000)
    assert (tmp_path / "c" / "model.safetensors.index.json").exists()
    again = from_hugging_face(tmp_path / "c")
    to_hugging_face(again, tmp_path / "b", variant="offline")
    with Checkpoint(tmp_path / "in") as before, Checkpoint(tmp_path / "b") as after:
        for name in before.keys():  # noqa: SIM118
            if before.dtype(name) == "U8":
                shape = before.shape(name)
                given, written = (c.read(name, shape, ["U8"]) for c in (before, after))
                np.testing.assert_array_equal(written, given)
    tokens = clear_tokens(model)
    assert_same_logits(our_logits(again, tokens), our_logits(model, tokens))


def test_masters_can_be_packed_as_they_are_read(tmp_path):
    make_checkpoint(tmp_path, "bitnet", "online")
    model = from_hugging_face(tmp_path, packed=True)
    assert model.packed
    tokens = clear_tokens(model)
    expected = our_logits(from_hugging_face(tmp_path), tokens)
    assert_same_logits(our_logits(model, tokens), expected)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "gpt2"}, "Received: 'gpt2'"),
        ({"hidden_size": "32"}, "Received: hidden_size='32'"),
        ({"hidden_size": 10**12}, "positive integer"),
        ({"vocab_size": 2**30}, "describes an embedding"),
        ({"num_hidden_layers": 10**6}, "no tensors 'model.layers.999999"),
        ({"intermediate_size": 10**8}, "describes blocks"),
        ({"num_attention_heads": 4096, "head_dim": 4096}, "describes blocks"),
        ({"attention_bias": True}, "attention_bias=true"),
        ({"hidden_act": "gelu"}, "Received: 'gelu'"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "Received: 'yarn'"),
        ({"quantization_config": {"quant_method": "gptq"}}, "Received: 'gptq'"),
    ],
)
def test_other_models_and_absurd_sizes_are_refused(changes, message, tmp_path):
    make_checkpoint(tmp_path, "bitnet", "offline")
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **changes}))
    with pytest.raises(ValueError, match=message):
        from_hugging_face(tmp_path)


def test_what_a_variant_cannot_hold_is_refused(tmp_path):
    make_checkpoint(tmp_path, "llama", "float")
    model = from_hugging_face(tmp_path, packed=True, weight_quantizer="int4")
    with pytest.raises(ValueError, match="ternary weights with a scale per tensor"):
        to_hugging_face(model, tmp_path / "out")
    with pytest.raises(ValueError, match="`variant` must be one of"):
        to_hugging_face(model, tmp_path / "out", variant="gptq")
    assert not (tmp_path / "out").exists()
    to_hugging_face(model, tmp_path / "out", variant="float")
    tokens = np.array([[3, 1, 4, 1, 5]])
    assert np.isfinite(their_logits(tmp_path / "out", tokens)).all()


def test_a_name_on_the_hub_is_no_folder():
    with pytest.raises(FileNotFoundError, match=r"snapshot_download\('microsoft/bitnet'\)"):
        from_hugging_face("microsoft/bitnet")
