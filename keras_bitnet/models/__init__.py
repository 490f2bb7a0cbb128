"""Low-bit language models: the BitNet decoder, generation and conversion of float models."""

from keras_bitnet.models.backbone import BitNetBackbone
from keras_bitnet.models.causal_lm import BitNetCausalLM
from keras_bitnet.models.conversion import convert_to_bitnet
from keras_bitnet.models.distillation import BitDistiller
from keras_bitnet.models.presets import PRESETS
from keras_bitnet.models.sampling import Sampler

__all__ = [
    "PRESETS",
    "BitDistiller",
    "BitNetBackbone",
    "BitNetCausalLM",
    "Sampler",
    "convert_to_bitnet",
]
