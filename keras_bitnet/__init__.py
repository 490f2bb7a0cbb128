"""Low-bit neural networks in Keras 3: train, save, pack and run."""

from importlib.metadata import PackageNotFoundError, version

from keras_bitnet import callbacks, layers, models, ops, quantizers
from keras_bitnet.kernels.select import explain
from keras_bitnet.report import summary
from keras_bitnet.transforms import pack_model, quantize_model, unpack_model

__all__ = [
    "callbacks",
    "explain",
    "layers",
    "models",
    "ops",
    "pack_model",
    "quantize_model",
    "quantizers",
    "summary",
    "unpack_model",
]

try:
    __version__ = version("keras-bitnet")
except PackageNotFoundError:  # run from a source tree that is not installed
    __version__ = "0.0.0"
