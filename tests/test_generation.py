import keras
import numpy as np
import pytest
from helpers import BACKEND, to_numpy
from keras import ops
from test_models import make_model

import keras_bitnet
from keras_bitnet.models import Sampler, compiled, generation
from keras_bitnet.models.sampling import argmax

PROMPTS = [[3, 1, 4, 1, 5], [9, 2], [6]]


@pytest.fixture(scope="module")
def model():
    keras.utils.set_random_seed(1)
    # Large weights, so that the likeliest token is not a matter of rounding.
    wide = keras.initializers.RandomNormal(stddev=0.5)
    return keras_bitnet.pack_model(make_model(kernel_initializer=wide), verbose=0)


def greedy(model, prompt, count):
    """Without a cache: the whole sequence again for each token, at one length."""
    row = np.zeros((1, 12), "int32")
    row[0, : len(prompt)] = prompt
    for i in range(len(prompt), len(prompt) + count):
        data = {"token_ids": row, "padding_mask": np.arange(12)[None] < i}
        row[0, i] = model.predict(data, verbose=0)[0, i - 1].argmax()
    return row[0, : len(prompt) + count].tolist()


@pytest.mark.parametrize("dtype", ["bfloat16", "mixed_bfloat16"])
def test_a_cache_keeps_its_dtype_in_a_model_of_16_bits(dtype):
    keras.utils.set_random_seed(1)
    model = make_model(dtype=dtype, activation="silu")
    for cache_dtype in ("int8", "float32"):
        _, cache = model.backbone.call_with_cache(
            ops.convert_to_tensor([[3, 1, 4]]), model.backbone.make_cache(1, 8, cache_dtype), 0
        )
        written = {k: keras.backend.standardize_dtype(v.dtype) for k, v in cache[0].items()}
        assert {written["key"], written["value"]} == {cache_dtype}
        assert {v for k, v in written.items() if "scale" in k} <= {"float32"}
        assert len(model.generate([3, 1, 4], max_new_tokens=5, cache_dtype=cache_dtype)) == 8


def test_greedy_equals_no_cache_in_a_padded_batch(model):
    rows = model.generate(PROMPTS, max_new_tokens=6)
    assert rows == [greedy(model, prompt, 6) for prompt in PROMPTS]
    assert model.generate(PROMPTS[0], max_length=11) == rows[0]
    assert model.generate(PROMPTS[0], max_length=11, strip_prompt=True) == rows[0][5:]
    assert list(model.stream(PROMPTS[1], max_new_tokens=6)) == rows[1][2:]


def test_mixed_precision():
    keras.utils.set_random_seed(1)
    model = make_model(dtype="mixed_bfloat16")
    for network in (model, keras_bitnet.pack_model(model, verbose=0)):
        row = network.generate(PROMPTS[0], max_new_tokens=4)
        logits = to_numpy(ops.cast(network(np.array([row], "int32")), "float32"))[0, 4:-1]
        behind = logits.max(-1) - logits[np.arange(4), row[5:]]
        assert (behind < 0.3 * logits.std(-1)).all()


def test_argmax_is_the_first_of_the_largest():
    x = np.random.default_rng(0).integers(0, 90, (5, 768)).astype("float32")
    for size in (768, 300, 257, 1):
        found = argmax(ops.convert_to_tensor(x[:, :size]))
        np.testing.assert_array_equal(to_numpy(found), x[:, :size].argmax(-1))


def test_stop_tokens_end_sequences(model):
    rows = model.generate(PROMPTS, max_new_tokens=8, strip_prompt=True)
    stop = rows[0][2]
    cut = [row[: row.index(stop) + 1] if stop in row else row for row in rows]
    assert model.generate(PROMPTS, max_new_tokens=8, strip_prompt=True, stop_tokens=stop) == cut
    steps = list(model.stream(PROMPTS, max_new_tokens=8, stop_tokens=[stop]))
    assert [[s[i] for s in steps if s[i] is not None] for i in range(3)] == cut


@pytest.mark.skipif(BACKEND != "jax", reason="a call gives one token")
def test_several_tokens_of_a_call(model, monkeypatch):
    monkeypatch.setattr(generation, "_steps", lambda: 1)
    options = {"temperature": 0.9, "seed": 3, "strip_prompt": True}
    wanted = model.generate(PROMPTS, max_new_tokens=10, **options)
    monkeypatch.setattr(generation, "_steps", lambda: generation.STEPS)
    for count in (1, 2, 5, 6, 10):
        rows = model.generate(PROMPTS, max_new_tokens=count, **options)
        assert rows == [row[:count] for row in wanted]
    stop = wanted[0][2]
    cut = [row[: row.index(stop) + 1] if stop in row else row for row in wanted]
    assert model.generate(PROMPTS, max_new_tokens=10, stop_tokens=stop, **options) == cut


def test_int8_cache_is_close(model):
    exact = model.generate(PROMPTS, max_new_tokens=6)
    rough = model.generate(PROMPTS, max_new_tokens=6, cache_dtype="int8")
    assert (
        np.mean(
            [a == b for x, y in zip(exact, rough, strict=True) for a, b in zip(x, y, strict=True)]
        )
        > 0.7
    )
    cache = model.backbone.make_cache(2, 8, "int8")
    assert keras.backend.standardize_dtype(cache[0]["key"].dtype) == "int8"


def test_no_program_is_traced_twice(model, monkeypatch):
    calls = []
    original = type(model.backbone).call_with_cache

    def counting(self, *arguments, **keywords):
        calls.append(1)
        return original(self, *arguments, **keywords)

    monkeypatch.setattr(type(model.backbone), "call_with_cache", counting)
    monkeypatch.setattr(compiled, "CALLS_UNTIL_RECORD", 1)
    model.generate(PROMPTS[:2], max_new_tokens=9, temperature=0.9)
    first = len(calls)
    rows = [model.generate(PROMPTS[:2], max_new_tokens=20, temperature=0.9, seed=3)]
    assert 0 < first <= 4
    # PyTorch reads some prompts as they are, and records the next one.
    assert len(calls) == first + (BACKEND == "torch")
    rows.append(model.generate(PROMPTS[:2], max_new_tokens=20, temperature=0.9, seed=3))
    assert len(calls) == first + (BACKEND == "torch")
    assert rows[0] == rows[1]
    # Nothing of a prompt is in the record, neither its tokens nor how much of it is padding.
    short = model.generate([PROMPTS[1], PROMPTS[2]], max_new_tokens=6)
    assert short == [greedy(model, prompt, 6) for prompt in PROMPTS[1:]]


def test_sampling_follows_the_seed_and_the_distribution(model):
    options = {"max_new_tokens": 12, "temperature": 1.5}
    first = model.generate([PROMPTS[0]] * 2, seed=1, **options)
    assert first == model.generate([PROMPTS[0]] * 2, seed=1, **options)
    assert first != model.generate([PROMPTS[0]] * 2, seed=2, **options)
    assert first[0] != first[1]
    logits = np.log(np.array([[0.5, 0.3, 0.15, 0.05]], "float32")).repeat(2000, 0)
    uniform = (np.arange(2000, dtype="float32") + 0.5) / 2000

    def frequencies(**arguments):
        chosen = to_numpy(Sampler(**arguments)(keras.ops.convert_to_tensor(logits), uniform))
        return np.bincount(chosen, minlength=4) / 2000

    near = {"atol": 2e-3}
    np.testing.assert_allclose(frequencies(temperature=1.0), [0.5, 0.3, 0.15, 0.05], **near)
    np.testing.assert_allclose(frequencies(temperature=1.0, top_k=2), [0.625, 0.375, 0, 0], **near)
    three = np.array([0.5, 0.3, 0.15, 0]) / 0.95
    np.testing.assert_allclose(frequencies(temperature=1.0, top_p=0.85), three, **near)
    np.testing.assert_allclose(frequencies(temperature=1.0, top_p=0.4), [1, 0, 0, 0], **near)
    square = np.array([25, 9, 2.25, 0.25]) / 36.5
    np.testing.assert_allclose(frequencies(temperature=0.5), square, **near)
    for temperature in (0.0, 1e-38, 1e-40, 1e-60):
        np.testing.assert_allclose(frequencies(temperature=temperature), [1, 0, 0, 0])
        reverse = keras.ops.convert_to_tensor(30 * logits[:, ::-1])
        assert (to_numpy(Sampler(temperature)(reverse, uniform)) == 3).all()


def test_beam_search_of_full_width_finds_the_best(model):
    """With as many beams as tokens, two steps are an exhaustive search."""
    prompt, vocabulary = PROMPTS[1], model.backbone.vocabulary_size
    found = model.generate(prompt, max_new_tokens=2, beams=vocabulary)
    pairs = np.stack(np.meshgrid(range(vocabulary), range(vocabulary), indexing="ij"), -1)
    rows = np.hstack([np.tile(prompt, (vocabulary**2, 1)), pairs.reshape(-1, 2)]).astype("int32")
    logits = to_numpy(model.predict(rows, batch_size=500, verbose=0)).astype("float64")
    logits -= logits.max(-1, keepdims=True)
    logits -= np.log(np.exp(logits).sum(-1, keepdims=True))
    at = np.arange(len(rows))
    scores = logits[at, 1, rows[:, 2]] + logits[at, 2, rows[:, 3]]
    found_at = np.where((rows == found).all(1))[0][0]
    assert scores[found_at] > scores.max() - 1e-3
    batch = model.generate(PROMPTS, max_new_tokens=4, beams=3)
    assert batch[1] == model.generate(PROMPTS[1], max_new_tokens=4, beams=3)


class Letters:
    """A tokenizer: a token is a letter from `a` on; ids 40 and on are no letters."""

    stop_tokens = (45,)

    def encode(self, text):
        return [ord(c) - ord("a") for c in text]

    def decode(self, ids):
        return "".join(chr(i + ord("a")) for i in ids)


def test_text_goes_through_the_tokenizer(model):
    with pytest.raises(ValueError, match="tokenizer"):
        model.generate("abc", max_length=6)
    model.tokenizer = Letters()
    try:
        text = model.generate("dbe", max_new_tokens=5)
        ids = model.generate(Letters().encode("dbe"), max_new_tokens=5, stop_tokens=45)
        assert text == Letters().decode(ids)
        assert "dbe" + "".join(model.stream("dbe", max_new_tokens=5)) == text
        assert model.generate(["dbe", "a"], max_new_tokens=5)[0] == text
    finally:
        model.tokenizer = None


class Halves(Letters):
    """A character takes two tokens, and none ends a text."""

    stop_tokens = ()

    def decode(self, ids):
        whole = super().decode(list(ids)[::2])
        return whole[:-1] + "\ufffd" if len(ids) % 2 else whole


@pytest.mark.parametrize("count", [4, 5])
def test_a_text_that_ends_within_a_character(model, count):
    model.tokenizer = Halves()
    try:
        text = model.generate("db", max_new_tokens=count, strip_prompt=True)
        assert text.endswith("\ufffd") == (count == 5)
        pieces = list(model.stream("db", max_new_tokens=count))
        assert "".join(pieces) == text
        assert len(pieces) == count + (count == 5)
    finally:
        model.tokenizer = None


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ([[1], []], {"max_length": 4}, "at least one token"),
        ([], {"max_length": 4}, "at least one prompt"),
        ([1, 50], {"max_length": 4}, "0, 50"),
        ([1, 2], {"max_length": 2}, "max_length=2"),
        ([1, 2], {"max_length": 5000}, "4096"),
        ([1, 2], {"max_length": 5.0}, "max_length=5.0"),
        ([1, 2], {"max_new_tokens": 5.0}, "max_new_tokens=5.0"),
        ([[1, 2.5]], {"max_length": 4}, r"\[1, 2.5\]"),
        ([1, 2], {}, "Give one of"),
        ([1, 2], {"max_length": 4, "temperature": -1}, "temperature=-1"),
        ([1, 2], {"max_length": 4, "top_k": 0}, "top_k=0"),
        ([1, 2], {"max_length": 4, "top_p": 1.5}, "top_p=1.5"),
        ([1, 2], {"max_length": 4, "top_k": 3, "beams": 2}, "beam search"),
        ([1, 2], {"max_length": 4, "beams": 51}, "beams=51"),
        ([1, 2], {"max_length": 4, "beams": 0}, "beams=0"),
        ([1, 2], {"max_length": 4, "stop_tokens": "</s>"}, "Received: '</s>'"),
    ],
)
def test_bad_requests(prompts, options, message, model):
    with pytest.raises(ValueError, match=message):
        model.generate(prompts, **options)


def test_new_weights_are_used():
    keras.utils.set_random_seed(3)
    other = make_model(kernel_initializer=keras.initializers.RandomNormal(stddev=0.5))
    before = other.generate(PROMPTS[0], max_new_tokens=6)
    other.backbone.layer_norm.scale.assign(-to_numpy(other.backbone.layer_norm.scale))
    assert other.generate(PROMPTS[0], max_new_tokens=6) != before
    assert other.generate(PROMPTS[0], max_new_tokens=6) == greedy(other, PROMPTS[0], 6)
    if BACKEND == "torch":  # a tensor in the place of another, not a value in it
        scale = other.backbone.layer_norm.scale
        scale.value.data = -scale.value.data
        assert other.generate(PROMPTS[0], max_new_tokens=6) == before
    on_gpu = BACKEND == "torch" and scale.value.device.type == "cuda"
    assert compiled.is_asynchronous(keras.ops.zeros(3)) == (BACKEND == "jax" or on_gpu)
