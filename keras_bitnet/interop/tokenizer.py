"""Tokenizers of checkpoints: text to token ids and back, chat templates."""

import pathlib

from keras_bitnet.interop.chat_template import render_chat
from keras_bitnet.interop.files import read_json, read_text, require

MODEL = "tokenizer.json"
SETTINGS = "tokenizer_config.json"
TEMPLATE = "chat_template.jinja"


class Tokenizer:
    """Text to token ids and back, by the `tokenizers` package.

    Args:
        tokenizer: `tokenizers.Tokenizer`.
        bos_token_id: Token that a text begins with, or `None`.
        eos_token_ids: Tokens that end an answer.
        pad_token_id: Token of padding, or `None`: the first of `eos_token_ids`.
        chat_template: Jinja template of a conversation, or `None`.

    Example:
    >>> tokenizer = Tokenizer.from_folder("path/of/checkpoint")
    >>> prompt = tokenizer.apply_chat_template([{"role": "user", "content": "Hello!"}])
    >>> token_ids = tokenizer.encode(prompt, add_special_tokens=False)
    """

    def __init__(
        self, tokenizer, bos_token_id=None, eos_token_ids=(), pad_token_id=None, chat_template=None
    ):
        self.tokenizer = tokenizer
        self.bos_token_id = bos_token_id
        self.eos_token_ids = tuple(eos_token_ids)
        if pad_token_id is None and self.eos_token_ids:
            pad_token_id = self.eos_token_ids[0]
        self.pad_token_id = pad_token_id
        self.chat_template = chat_template

    @classmethod
    def from_folder(cls, path):
        """Reads `tokenizer.json` and the settings beside it.

        Args:
            path: Folder of a Hugging Face checkpoint, or the path of a `tokenizer.json`.

        Raises:
            FileNotFoundError: There is no `tokenizer.json`.
            ValueError: A file is invalid.
        """
        tokenizers = require("tokenizers", "hf")
        path = pathlib.Path(path)
        folder, file = (path, path / MODEL) if path.is_dir() else (path.parent, path)
        text = read_text(file)
        try:
            tokenizer = tokenizers.Tokenizer.from_str(text)
        except Exception as error:  # the package raises plain `Exception`
            raise ValueError(f"'{file}' is no valid tokenizer: {error}") from error
        settings, config, generation = (
            read_json(folder / name) if (folder / name).is_file() else {}
            for name in (SETTINGS, "config.json", "generation_config.json")
        )
        bos, eos, pad = (
            _ids(f"{name}_token", tokenizer, settings, generation, config)
            for name in ("bos", "eos", "pad")
        )
        template = settings.get("chat_template")
        if isinstance(template, list):  # named templates; the one for chat is "default"
            named = {t.get("name"): t.get("template") for t in template if isinstance(t, dict)}
            template = named.get("default")
        if (folder / TEMPLATE).is_file():
            template = read_text(folder / TEMPLATE)
        if not isinstance(template, (str, type(None))):
            raise ValueError(
                f"The chat template of '{folder}' must be a text. "
                f"Received: {type(template).__name__}"
            )
        first_bos, first_pad = (ids[0] if ids else None for ids in (bos, pad))
        return cls(tokenizer, first_bos, eos, first_pad, template)

    @classmethod
    def from_gguf(cls, path):
        """Makes the tokenizer that a GGUF file holds; see `interop.gguf_tokenizer`.

        Args:
            path: Path of the file.

        Raises:
            FileNotFoundError: There is no such file.
            ValueError: The file is corrupt, or its tokenizer of another kind.
        """
        from keras_bitnet.interop.gguf_file import GGUFFile
        from keras_bitnet.interop.gguf_tokenizer import read_tokenizer

        with GGUFFile(path) as file:
            return read_tokenizer(file.metadata)

    @property
    def vocabulary_size(self):
        """Number of tokens, the special ones included."""
        return self.tokenizer.get_vocab_size(with_added_tokens=True)

    @property
    def stop_tokens(self):
        """`eos_token_ids` as a list: where `BitNetCausalLM.generate` ends."""
        return list(self.eos_token_ids)

    def token(self, token_id):
        """The text of a token as the vocabulary has it, or `None`."""
        return None if token_id is None else self.tokenizer.id_to_token(token_id)

    def encode(self, text, add_special_tokens=True):
        """Token ids of a text.

        Args:
            text: String.
            add_special_tokens: Whether the tokens that the model expects around it are added.

        Returns:
            List of integers.
        """
        return self.tokenizer.encode(text, add_special_tokens=add_special_tokens).ids

    def decode(self, token_ids, skip_special_tokens=True):
        """The text of token ids.

        Args:
            token_ids: Sequence of integers.
            skip_special_tokens: Whether tokens such as the end of an answer are left out.
        """
        ids = [int(token_id) for token_id in token_ids]
        return self.tokenizer.decode(ids, skip_special_tokens=skip_special_tokens)

    def apply_chat_template(self, messages, add_generation_prompt=True, **variables):
        """The text of a conversation, special tokens included.

        Encode it with `add_special_tokens=False`.

        Args:
            messages: List of `{"role": "system" | "user" | "assistant", "content": text}`.
            add_generation_prompt: Whether the text ends where the assistant's answer begins.
            **variables: More variables of the template.

        Raises:
            ValueError: There is no template, or it fails on these messages.
        """
        if not self.chat_template:
            raise ValueError("This tokenizer has no chat template: it is not of a chat model.")
        return render_chat(
            self.chat_template,
            messages=messages,
            add_generation_prompt=add_generation_prompt,
            bos_token=self.token(self.bos_token_id) or "",
            eos_token=self.token(self.eos_token_ids[0]) if self.eos_token_ids else "",
            **variables,
        )

    def files(self):
        """The files of a checkpoint folder by name: `tokenizer.json` and its settings (JSON)."""
        settings = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": self.token(self.bos_token_id),
            "eos_token": self.token(self.eos_token_ids[0]) if self.eos_token_ids else None,
            "pad_token": self.token(self.pad_token_id),
            "chat_template": self.chat_template,
        }
        given = {key: value for key, value in settings.items() if value is not None}
        return {MODEL: self.tokenizer.to_str(), SETTINGS: given}


def _ids(name, tokenizer, settings, *configs):
    """Ids of a special token: of the settings of the tokenizer, then the other files."""
    ids: list[int] = []
    token = settings.get(name)
    token = token.get("content") if isinstance(token, dict) else token
    if isinstance(token, str) and tokenizer.token_to_id(token) is not None:
        ids.append(tokenizer.token_to_id(token))
    for config in configs:
        found = config.get(f"{name}_id")
        ids += [i for i in (found if isinstance(found, list) else [found]) if isinstance(i, int)]
    known = tokenizer.get_vocab_size(with_added_tokens=True)
    return [i for i in dict.fromkeys(ids) if 0 <= i < known]
