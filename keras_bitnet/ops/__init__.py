"""What every low-bit operation means. `keras_bitnet.kernels` only makes it fast."""

from keras_bitnet.ops import layout
from keras_bitnet.ops.bit_matmul import bit_matmul, joint_bit_matmul
from keras_bitnet.ops.hadamard import hadamard
from keras_bitnet.ops.packed_tensor import PackedTensor
from keras_bitnet.ops.reference import accumulate, reference_matmul
from keras_bitnet.ops.ste import blend, straight_through

__all__ = [
    "PackedTensor",
    "accumulate",
    "bit_matmul",
    "blend",
    "hadamard",
    "joint_bit_matmul",
    "layout",
    "reference_matmul",
    "straight_through",
]
