"""Low-bit neural networks in Keras 3: train, save, pack and run."""

from keras_bitnet import layers, ops, quantizers
from keras_bitnet.kernels.select import explain
from keras_bitnet.report import summary
from keras_bitnet.transforms import pack_model, quantize_model, unpack_model

__all__ = [
    "explain",
    "layers",
    "ops",
    "pack_model",
    "quantize_model",
    "quantizers",
    "summary",
    "unpack_model",
]
