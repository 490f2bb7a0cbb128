"""Tokenizers in GGUF files: byte-level BPE, in and out.

`tokenizer.ggml.model` must be `"gpt2"` (byte-level BPE), and `tokenizer.ggml.pre`, which names
how text is split before merging, one of `PRE_TOKENIZERS`.
"""

import dataclasses
import json
import warnings

from keras_bitnet.interop.files import require
from keras_bitnet.interop.tokenizer import Tokenizer

NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")


@dataclasses.dataclass(frozen=True)
class PreTokenizer:
    """How text is split before merging.

    Attributes:
        regex: What each piece matches.
        single_digits: Whether every digit is a piece of its own.
        ignore_merges: Whether a piece that is a token is taken as it is.
        add_bos: Whether a text begins with the bos token where the file does not say.
    """

    regex: str
    single_digits: bool = False
    ignore_merges: bool = False
    add_bos: bool = False


_LLAMA_BPE = PreTokenizer(_LLAMA3, ignore_merges=True, add_bos=True)
PRE_TOKENIZERS = {
    "gpt-2": PreTokenizer(_GPT2),
    "smollm": PreTokenizer(_GPT2, single_digits=True),
    "starcoder": PreTokenizer(_GPT2, single_digits=True),
    "llama-bpe": _LLAMA_BPE,
    "llama3": _LLAMA_BPE,
    "falcon3": _LLAMA_BPE,
    "qwen2": PreTokenizer(_QWEN2),
}


def read_tokenizer(metadata):
    """Makes the `Tokenizer` that the metadata of a GGUF file describes.

    Raises:
        ValueError: It is of a kind that is not supported, or inconsistent.
    """
    kind = metadata.get("tokenizer.ggml.model")
    pre = metadata.get("tokenizer.ggml.pre", "default")
    if kind != "gpt2" or not isinstance(pre, str) or pre not in PRE_TOKENIZERS:
        raise ValueError(
            "Tokenizers of GGUF files are supported where `tokenizer.ggml.model` is 'gpt2' and "
            f"`tokenizer.ggml.pre` one of {sorted(PRE_TOKENIZERS)}. Received: {kind!r} and "
            f"{pre!r}. Take the model's `tokenizer.json` with `Tokenizer.from_folder`."
        )
    template = metadata.get("tokenizer.chat_template")
    if not isinstance(template, (str, type(None))):
        raise ValueError(f"The chat template must be a text. Received: {type(template).__name__}")
    rule = PRE_TOKENIZERS[pre]
    tokens, merges, types = _vocabulary(metadata)
    tokenizer = _build(tokens, merges, types, rule)
    bos, pad = (_known(metadata, name, tokens) for name in ("bos", "padding"))
    eos = [_known(metadata, name, tokens) for name in ("eos", "eot")]
    if metadata.get("tokenizer.ggml.add_bos_token", rule.add_bos) and bos is not None:
        processors = require("tokenizers.processors", "hf")
        tokenizer.post_processor = processors.TemplateProcessing(
            single=[tokens[bos], "$A"], special_tokens=[(tokens[bos], bos)]
        )
    return Tokenizer(
        tokenizer,
        bos_token_id=bos,
        eos_token_ids=dict.fromkeys(i for i in eos if i is not None),
        pad_token_id=pad,
        chat_template=template,
    )


def _vocabulary(metadata):
    tokens = metadata.get("tokenizer.ggml.tokens")
    merges = metadata.get("tokenizer.ggml.merges", [])
    for name, value in (("tokens", tokens), ("merges", merges)):
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise ValueError(f"`tokenizer.ggml.{name}` of the file must be a list of strings.")
    types = metadata.get("tokenizer.ggml.token_type") or [NORMAL] * len(tokens)
    pairs = [tuple(merge.split(" ")) for merge in merges]
    if (
        not isinstance(types, list)
        or len(types) != len(tokens)
        or any(len(pair) != 2 for pair in pairs)
    ):
        raise ValueError("The tokenizer of the file is inconsistent: its types or merges.")
    return tokens, pairs, types


def _build(tokens, merges, types, rule):
    tokenizers = require("tokenizers", "hf")
    vocabulary = {token: i for i, token in enumerate(tokens)}
    if len(vocabulary) != len(tokens):
        raise ValueError("The tokenizer of the file holds a token twice.")
    try:
        bpe = tokenizers.models.BPE(vocabulary, merges, ignore_merges=rule.ignore_merges)
    except Exception as error:  # the package raises plain `Exception`
        raise ValueError(f"The tokenizer of the file is inconsistent: {error}") from error
    tokenizer = tokenizers.Tokenizer(bpe)
    split = tokenizers.pre_tokenizers
    steps = [split.Digits(individual_digits=True)] if rule.single_digits else []
    if rule.regex == _GPT2:
        steps.append(split.ByteLevel(add_prefix_space=False, use_regex=True))
    else:
        steps.append(split.Split(tokenizers.Regex(rule.regex), behavior="isolated"))
        steps.append(split.ByteLevel(add_prefix_space=False, use_regex=False))
    tokenizer.pre_tokenizer = split.Sequence(steps)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    for wanted, special in ((CONTROL, True), (USER_DEFINED, False)):
        tokenizer.add_tokens(
            [
                tokenizers.AddedToken(token, special=special, normalized=False)
                for token, kind in zip(tokens, types, strict=True)
                if kind == wanted
            ]
        )
    return tokenizer


def _known(metadata, name, tokens):
    token_id = metadata.get(f"tokenizer.ggml.{name}_token_id")
    return token_id if isinstance(token_id, int) and 0 <= token_id < len(tokens) else None


def tokenizer_metadata(tokenizer, vocabulary_size):
    """The metadata that describes a `Tokenizer` in a GGUF file.

    Args:
        tokenizer: `Tokenizer` of byte-level BPE.
        vocabulary_size: Rows of the model's embedding; missing tokens are written as unused.

    Returns:
        Dictionary of keys and values (text, integers, booleans, lists).

    Raises:
        ValueError: It is no byte-level BPE, or has more tokens than the model.
    """
    state = json.loads(tokenizer.tokenizer.to_str())
    model = state["model"]
    if model.get("type") != "BPE" or model.get("byte_fallback"):
        raise ValueError(
            "A GGUF file can hold a tokenizer of byte-level BPE. Received: "
            f"{model.get('type')}{' with byte fallback' if model.get('byte_fallback') else ''}"
        )
    vocabulary = tokenizer.tokenizer.get_vocab(with_added_tokens=True)
    if max(vocabulary.values()) >= vocabulary_size:
        raise ValueError(
            f"The tokenizer has the token {max(vocabulary.values())}, the model only "
            f"{vocabulary_size}."
        )
    tokens = [f"[PAD{i}]" for i in range(vocabulary_size)]
    types = [UNUSED] * vocabulary_size
    for token, i in vocabulary.items():
        tokens[i], types[i] = token, NORMAL
    for added in state.get("added_tokens", []):
        types[added["id"]] = CONTROL if added["special"] else USER_DEFINED
    merges = [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]
    metadata = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": _pre_name(state),
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.bos_token_id": tokenizer.bos_token_id,
        "tokenizer.ggml.eos_token_id": next(iter(tokenizer.eos_token_ids), None),
        "tokenizer.ggml.padding_token_id": tokenizer.pad_token_id,
        "tokenizer.ggml.add_bos_token": _adds_bos(tokenizer),
        "tokenizer.chat_template": tokenizer.chat_template,
    }
    return {key: value for key, value in metadata.items() if value is not None}


def _adds_bos(tokenizer):
    return tokenizer.bos_token_id is not None and (
        tokenizer.encode("a")[:1] == [tokenizer.bos_token_id]
    )


def _pre_name(state):
    """The name of the first row of `PRE_TOKENIZERS` that splits as a `tokenizer.json` does."""
    step = state.get("pre_tokenizer") or {}
    steps = step.get("pretokenizers", [step])
    single_digits = any(s.get("type") == "Digits" and s.get("individual_digits") for s in steps)
    regexes = [s["pattern"].get("Regex") for s in steps if s.get("type") == "Split"]
    if any(s.get("type") == "ByteLevel" and s.get("use_regex", True) for s in steps):
        regexes.append(_GPT2)
    ignore_merges = bool(state["model"].get("ignore_merges"))
    for name, rule in PRE_TOKENIZERS.items():
        if regexes == [rule.regex] and (single_digits, ignore_merges) == (
            rule.single_digits,
            rule.ignore_merges,
        ):
            return name
    warnings.warn(
        "The tokenizer splits text in a way that has no name in GGUF known here; it is written as "
        "'gpt-2', and llama.cpp may split some texts differently.",
        stacklevel=4,
    )
    return "gpt-2"
