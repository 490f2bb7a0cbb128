"""Whole models from files of strangers: absurd values, missing tensors, damage."""

import json
import math

import numpy as np
import pytest
from helpers import damaged
from test_gguf import make_model

from keras_bitnet.interop import from_gguf, from_hugging_face, to_gguf, to_hugging_face
from keras_bitnet.interop.safetensors_file import Checkpoint, write_checkpoint

pytest.importorskip("safetensors")
ABSURD = (None, -1, 0, 2**60, 2**31 - 1, "x", [], {}, [1], {"a": 1}, 1e308, math.inf, math.nan)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hostile") / "checkpoint"
    model = make_model("rms", hidden_dim=32, activation="relu2", weight_quantizer="ternary")
    to_hugging_face(model, folder)
    return folder


def test_absurd_values_of_a_config_are_refused(checkpoint):
    """Nothing but a ValueError, and no memory for a size that the file does not hold."""
    path = checkpoint / "config.json"
    config = json.loads(path.read_text())
    refused = 0
    for key in config:
        for value in ABSURD:
            path.write_text(json.dumps({**config, key: value}))
            try:
                from_hugging_face(checkpoint)
            except ValueError:
                refused += 1
    path.write_text(json.dumps(config))
    assert refused > 100


def test_every_missing_tensor_is_named(checkpoint, tmp_path):
    (tmp_path / "config.json").write_text((checkpoint / "config.json").read_text())
    with Checkpoint(checkpoint) as file:
        dtypes = ("U8", "F32")
        tensors = {name: file.read(name, file.shape(name), dtypes) for name in file.keys()}  # noqa: SIM118
    for name in tensors:
        write_checkpoint(tmp_path, {k: v for k, v in tensors.items() if k != name}.items())
        with pytest.raises(ValueError, match="no tensor"):
            from_hugging_face(tmp_path)
        wrong = {**tensors, name: np.zeros((3, 3), np.float32)}
        write_checkpoint(tmp_path, wrong.items())
        with pytest.raises(ValueError, match=r"shape|describes|outputs"):
            from_hugging_face(tmp_path)


@pytest.mark.filterwarnings("ignore:The model is read without")
def test_a_damaged_gguf_model_raises_nothing_but_value_errors(tmp_path, rng):
    pytest.importorskip("gguf")
    model = make_model(hidden_dim=32, packed=False, quantization_strength=0.0)
    to_gguf(model, tmp_path / "m.gguf", type="f32")
    whole = (tmp_path / "m.gguf").read_bytes()
    refused = 0
    for content in damaged(whole, rng, trials=60, reach=1500, most=4):
        (tmp_path / "damaged.gguf").write_bytes(content)
        try:
            from_gguf(tmp_path / "damaged.gguf")
        except ValueError:
            refused += 1
    assert refused > 30
