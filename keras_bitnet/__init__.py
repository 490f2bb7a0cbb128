"""Low-bit neural networks in Keras 3: train, save, pack and run."""

from keras_bitnet import layers, ops, quantizers
from keras_bitnet.kernels.select import explain

__all__ = ["explain", "layers", "ops", "quantizers"]
