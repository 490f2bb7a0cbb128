"""`keras-bitnet generate` and `chat`."""

import io

import keras
import pytest
from helpers import run_json
from test_gguf import make_model
from test_interop_tokenizer import metadata

from keras_bitnet import cli
from keras_bitnet.interop import to_gguf
from keras_bitnet.interop.gguf_tokenizer import read_tokenizer

pytest.importorskip("tokenizers")
TEMPLATE = "{% for m in messages %}<s>{{ m.role }}: {{ m.content }}{% endfor %}<s>assistant: "


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A model with its tokenizer as .gguf, and without as .keras."""
    keras.utils.set_random_seed(0)
    folder = tmp_path_factory.mktemp("text")
    tokenizer = read_tokenizer(metadata("llama-bpe", **{"tokenizer.chat_template": TEMPLATE}))
    tokenizer.eos_token_ids = ()  # random weights would end an answer at any time
    model = make_model(weight_quantizer="ternary", vocabulary_size=tokenizer.vocabulary_size)
    model.tokenizer = tokenizer
    model.save(folder / "m.keras")
    to_gguf(model, folder / "m.gguf", embedding_type="f32")
    return model, folder / "m.gguf", folder / "m.keras"


def test_generate_is_that_of_the_model(files, capsys):
    model, gguf, saved = files
    expected = model.generate("hello", max_new_tokens=5, strip_prompt=True)
    facts = run_json(capsys, "generate", gguf, "hello", "--max-new-tokens", 5)
    assert (facts["prompt"], facts["text"], facts["new_tokens"]) == ("hello", expected, 5)
    assert facts["tokens_per_second"] > 0
    arguments = [saved, "hello", "--tokenizer", gguf, "--max-new-tokens", 5]
    assert cli.main(["generate", *map(str, arguments)]) == 0
    assert capsys.readouterr().out == f"hello{expected}\n"


def test_sampling_options_reach_the_model(files, capsys, monkeypatch):
    model, gguf, _ = files
    options = {"max_new_tokens": 6, "temperature": 5.0, "top_k": 50, "top_p": 0.9, "seed": 3}
    expected = model.generate("no hello", strip_prompt=True, **options)
    flags = [x for key, value in options.items() for x in (f"--{key.replace('_', '-')}", value)]
    monkeypatch.setattr("sys.stdin", io.StringIO("no hello"))
    assert run_json(capsys, "generate", gguf, *flags)["text"] == expected
    assert expected != model.generate("no hello", strip_prompt=True, max_new_tokens=6)


def test_chat_answers_every_line(files, capsys, monkeypatch):
    model, gguf, _ = files
    monkeypatch.setattr("sys.stdin", io.StringIO("hello\n\nno\n"))
    arguments = ["chat", str(gguf), "--system", "it is", "--max-new-tokens", "3"]
    result = run_json(capsys, *arguments)
    messages = result["messages"]
    roles = ["system", "user", "assistant", "user", "assistant"]
    assert [message["role"] for message in messages] == roles
    assert [m["content"] for m in messages if m["role"] == "user"] == ["hello", "no"]
    assert result["new_tokens"] == 6
    rendered = "".join(f"<s>{m['role']}: {m['content']}" for m in messages[:4]) + "<s>assistant: "
    tokens = model.tokenizer.encode(rendered, add_special_tokens=False)
    assert tokens.count(0) == 5  # "<s>" is one token, and no other comes before it
    answer = model.generate([tokens], max_new_tokens=3, strip_prompt=True)[0]
    assert messages[4]["content"] == model.tokenizer.decode(answer)
    monkeypatch.setattr("sys.stdin", io.StringIO("hello\nno\n"))
    assert cli.main(arguments) == 0
    answers = [m["content"] for m in messages if m["role"] == "assistant"]
    assert capsys.readouterr().out == "".join(f"{answer}\n" for answer in answers)


def test_errors_are_one_line(files, capsys, tmp_path):
    _, gguf, saved = files
    keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)]).save(tmp_path / "m.keras")
    for arguments, message in (
        ([saved, "a"], "give --tokenizer"),
        ([tmp_path / "m.keras", "a"], "holds no language model"),
        ([tmp_path / "none.gguf", "a"], "There is no file"),
        ([gguf, ""], "no text to continue"),
        ([gguf, "a", "--temperature", "-1"], "`temperature` must be a number"),
        ([gguf, "a", "--max-new-tokens", "1000"], "the model takes 64"),
        ([gguf, "a", "--seed", "-1"], "seed=-1"),
    ):
        assert cli.main(["generate", *map(str, arguments), "--json"]) == 1
        captured = capsys.readouterr()
        assert message in captured.err
        assert captured.out == ""
