"""Low-bit language models: the BitNet decoder, generation and conversion of float models."""

from keras_bitnet.models.backbone import BitNetBackbone
from keras_bitnet.models.causal_lm import BitNetCausalLM
from keras_bitnet.models.presets import PRESETS, BitNetConfig

__all__ = ["PRESETS", "BitNetBackbone", "BitNetCausalLM", "BitNetConfig"]
