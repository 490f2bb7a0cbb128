import json
import string

import pytest

from keras_bitnet.interop.chat_template import render_chat
from keras_bitnet.interop.gguf_tokenizer import PRE_TOKENIZERS, read_tokenizer, tokenizer_metadata
from keras_bitnet.interop.tokenizer import Tokenizer

pytest.importorskip("tokenizers")
TEXTS = ["It's 12345 o'clock  now!\n\n  Yes\tit IS", "naïve 日本語 😀", "<s>hello</s> x=3.14", " a"]
TEMPLATE = "{% for m in messages %}<s>{{ m.role }}: {{ m['content'] }}</s>\n{% endfor %}"


def metadata(pre, **changes):
    """A tiny byte-level vocabulary as a GGUF file has it."""
    from tokenizers import pre_tokenizers

    tokens = ["<s>", "</s>", "<unused>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    merges = ["h e", "l l", "he ll", "hell o", "1 2", "12 3", "Ġ n", "Ġn o", "n o", "Ġ Ġ"]
    tokens += [merge.replace(" ", "") for merge in merges]
    types = [3, 3, 5] + [1] * (len(tokens) - 3)
    return {
        "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens, "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.token_type": types, "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 1, "tokenizer.chat_template": TEMPLATE, **changes,
    }  # fmt: skip


def write(tokenizer, folder):
    for name, content in tokenizer.files().items():
        text = content if isinstance(content, str) else json.dumps(content)
        (folder / name).write_text(text, encoding="utf-8")


@pytest.mark.parametrize("pre", PRE_TOKENIZERS)
def test_a_gguf_tokenizer_comes_in_and_goes_out(pre):
    given = metadata(pre)
    tokenizer = read_tokenizer(given)
    first = [0] if PRE_TOKENIZERS[pre].add_bos else []
    for text in TEXTS:
        ids = tokenizer.encode(text)
        assert ids[: len(first)] == first
        assert tokenizer.decode(ids[len(first) :], skip_special_tokens=False) == text
    assert tokenizer.encode("<s>hello</s>", add_special_tokens=False)[::2] == [0, 1]
    assert (tokenizer.bos_token_id, tokenizer.eos_token_ids, tokenizer.pad_token_id) == (0, (1,), 1)
    again = tokenizer_metadata(tokenizer, len(given["tokenizer.ggml.tokens"]) + 3)
    assert again["tokenizer.ggml.tokens"][:-3] == given["tokenizer.ggml.tokens"]
    assert again["tokenizer.ggml.token_type"][-3:] == [5, 5, 5]
    assert again["tokenizer.ggml.merges"] == given["tokenizer.ggml.merges"]
    assert PRE_TOKENIZERS[again["tokenizer.ggml.pre"]] == PRE_TOKENIZERS[pre]
    for text in TEXTS:
        assert read_tokenizer(again).encode(text) == tokenizer.encode(text)


def test_digits_are_split_as_the_kind_says():
    ids = {pre: read_tokenizer(metadata(pre)).encode("123", False) for pre in PRE_TOKENIZERS}
    assert (len(ids["gpt-2"]), len(ids["llama-bpe"]), len(ids["smollm"])) == (1, 1, 3)
    assert len(ids["qwen2"]) == 3


def test_a_folder_keeps_tokenizer_and_template(tmp_path):
    tokenizer = read_tokenizer(metadata("llama-bpe"))
    write(tokenizer, tmp_path)
    again = Tokenizer.from_folder(tmp_path)
    for text in TEXTS:
        assert again.encode(text) == tokenizer.encode(text)
    assert (again.bos_token_id, again.eos_token_ids) == (0, (1,))
    messages = [{"role": "user", "content": "hello"}]
    assert again.apply_chat_template(messages) == "<s>user: hello</s>\n"
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [1, 2, 99999]}')
    assert Tokenizer.from_folder(tmp_path / "tokenizer.json").eos_token_ids == (1, 2)


def test_transformers_reads_the_folder_alike(tmp_path):
    transformers = pytest.importorskip("transformers")
    tokenizer = read_tokenizer(metadata("smollm"))
    write(tokenizer, tmp_path)
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path)
    for text in TEXTS:
        assert theirs.encode(text) == tokenizer.encode(text)
    messages = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "no"}]
    expected = theirs.apply_chat_template(messages, tokenize=False)
    assert tokenizer.apply_chat_template(messages) == expected


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ cycler.__init__.__globals__.os.system('true') }}",
        "{{ strftime_now.__globals__.items() }}",
        "{{ raise_exception('no') }}",
        "{% for i in range(10**9) %}{% endfor %}",
        "{{ unclosed",
        "{{ 'a' * 10**10 }}",
        "{{ [0] * 10**9 }}",
        "{{ 10 ** 10 ** 9 }}",
        "{{ 2.0 ** 1000000 }}",
        "{{ 1 // 0 }}",
        "{{ none * 3 }}",
        "{{ messages[0].role.x }}",
        ["no text"],
    ],
)
def test_templates_stay_in_their_sandbox(template):
    with pytest.raises(ValueError, match=r"template cannot take|template is a text"):
        render_chat(template, messages=[])


def test_templates_may_multiply_a_little():
    assert render_chat("{{ '-' * 3 }}{{ 2 ** 10 * 1000 }}") == "---1024000"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokenizer.ggml.model": "llama"}, "Received: 'llama'"),
        ({"tokenizer.ggml.pre": "brand-new"}, "'brand-new'"),
        ({"tokenizer.ggml.tokens": None}, "list of strings"),
        ({"tokenizer.ggml.tokens": ["a", "a"]}, "inconsistent"),
        ({"tokenizer.ggml.merges": ["zzz qqq"]}, "inconsistent"),
        ({"tokenizer.ggml.merges": ["a b c"]}, "inconsistent"),
        ({"tokenizer.ggml.token_type": 7}, "inconsistent"),
        ({"tokenizer.ggml.pre": ["gpt-2"]}, "Received: 'gpt2' and"),
        ({"tokenizer.chat_template": 5}, "template must be a text"),
    ],
)
def test_bad_metadata(changes, message):
    with pytest.raises(ValueError, match=message):
        read_tokenizer(metadata("gpt-2", **changes))


def test_what_does_not_fit_is_refused(tmp_path):
    tokenizer = read_tokenizer(metadata("gpt-2", **{"tokenizer.chat_template": None}))
    with pytest.raises(ValueError, match="only 5"):
        tokenizer_metadata(tokenizer, 5)
    with pytest.raises(ValueError, match="no chat template"):
        tokenizer.apply_chat_template([])
    write(tokenizer, tmp_path)
    for template in (5, {"default": "a"}, [{"name": "default", "template": []}]):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
        with pytest.raises(ValueError, match="must be a text"):
            Tokenizer.from_folder(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"chat_template": ["no object"]}')
    assert Tokenizer.from_folder(tmp_path).chat_template is None
    (tmp_path / "tokenizer.json").write_text("[" * 10**5)
    with pytest.raises(ValueError, match="no valid tokenizer"):
        Tokenizer.from_folder(tmp_path)
    (tmp_path / "tokenizer.json").write_text(string.ascii_letters)
    with pytest.raises(ValueError, match="no valid tokenizer"):
        Tokenizer.from_folder(tmp_path)
