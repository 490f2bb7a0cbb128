"""Whole-model transforms: each takes a model and returns a new one."""

from keras_bitnet.transforms.calibrate import calibrate
from keras_bitnet.transforms.pack import pack_model, unpack_model
from keras_bitnet.transforms.quantize import quantize_model
from keras_bitnet.transforms.rewrite import Change

__all__ = ["Change", "calibrate", "pack_model", "quantize_model", "unpack_model"]
