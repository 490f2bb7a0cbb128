"""The bytes of outside formats in plain NumPy: codes to bytes and back, never through float.

Matrices are `(out, in)` here, as all outside formats have them.
"""

from keras_bitnet.interop.codecs import hugging_face, i2_s
from keras_bitnet.interop.codecs.block_type import BlockType
from keras_bitnet.interop.codecs.q1_0 import Q1_0
from keras_bitnet.interop.codecs.q2_0 import Q2_0
from keras_bitnet.interop.codecs.q4_0 import Q4_0
from keras_bitnet.interop.codecs.q8_0 import Q8_0
from keras_bitnet.interop.codecs.tq1_0 import TQ1_0
from keras_bitnet.interop.codecs.tq2_0 import TQ2_0

BLOCK_TYPES = {block.name: block for block in (TQ2_0, TQ1_0, Q2_0, Q1_0, Q4_0, Q8_0)}

__all__ = ["BLOCK_TYPES", "BlockType", "hugging_face", "i2_s"]
