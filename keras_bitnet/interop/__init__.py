"""Models in and out: Hugging Face and GGUF."""

from keras_bitnet.interop.tokenizer import Tokenizer

__all__ = ["Tokenizer"]
