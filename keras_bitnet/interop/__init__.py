"""Models in and out: Hugging Face and GGUF; in from KerasHub, out to ONNX."""

from keras_bitnet.interop.from_gguf import from_gguf
from keras_bitnet.interop.from_keras_hub import from_keras_hub
from keras_bitnet.interop.hugging_face import from_hugging_face, to_hugging_face
from keras_bitnet.interop.to_gguf import to_gguf
from keras_bitnet.interop.to_onnx import to_onnx
from keras_bitnet.interop.tokenizer import Tokenizer

__all__ = [
    "Tokenizer",
    "from_gguf",
    "from_hugging_face",
    "from_keras_hub",
    "to_gguf",
    "to_hugging_face",
    "to_onnx",
]
