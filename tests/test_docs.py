"""The programs in the documentation run as they are written."""

import re
import warnings

import keras
import numpy as np
import pytest
from helpers import ROOT, once
from test_gguf import make_model
from test_interop_tokenizer import metadata

import keras_bitnet
from keras_bitnet.layers import BitLinear

pytestmark = once


def blocks(page):
    """The Python blocks of a page, with the number of their first line."""
    text = (ROOT / page).read_text()
    return [
        pytest.param("\n" * text[: match.start(1)].count("\n") + match[1], page, id=f"{page}-{i}")
        for i, match in enumerate(re.finditer(r"^```python\n(.*?)^```", text, re.M | re.S))
    ]


def execute(code, page, names):
    exec(compile(code, str(ROOT / page), "exec"), names)


@pytest.fixture
def names(tmp_path, monkeypatch, rng):
    """What the blocks of a page take for granted."""
    monkeypatch.chdir(tmp_path)
    encoder = keras.Sequential(
        [keras.Input((784,)), keras.layers.Dense(16), keras.layers.Dense(16)], name="encoder"
    )
    model = keras.Sequential([encoder, BitLinear(10, name="head")])
    model.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    x, y = rng.normal(size=(32, 784)).astype("float32"), rng.integers(0, 10, 32)
    quantized = keras_bitnet.quantize_model(model, "int4", verbose=0)
    return {
        "keras": keras, "keras_bitnet": keras_bitnet, "BitLinear": BitLinear, "model": model,
        "x": x, "y": y, "x_train": x, "y_train": y, "quantized": quantized, "float_model": model,
    }  # fmt: skip


@pytest.mark.parametrize(("code", "page"), blocks("README.md"))
def test_readme(code, page, names):
    if "from_gguf" in code:
        reader = pytest.importorskip("keras_bitnet.interop.gguf_tokenizer")
        tokenizer = reader.read_tokenizer(metadata("llama-bpe"))
        lm = make_model(vocabulary_size=tokenizer.vocabulary_size)
        lm.tokenizer = tokenizer
        keras_bitnet.interop.to_gguf(lm, "model.gguf")
    execute(code, page, names)


def test_reports(names):
    for code, page in (block.values for block in blocks("docs/reports.md")):
        execute(code, page, names)


def test_guide(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {}
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # nothing in it is ill-advised
        for code, page in (block.values for block in blocks("docs/guide.md")):
            execute(code, page, names)
    assert names["packed"].hidden[0].packed
    np.testing.assert_allclose(
        names["served"].predict(names["x"][:4]), names["packed"].predict(names["x"][:4]), rtol=1e-5
    )
