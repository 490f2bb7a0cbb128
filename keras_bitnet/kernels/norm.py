"""Which kernel computes a root mean square norm, and why: tables as in `select`.

One operator takes the place of six to ten of a framework on a CPU, and on a GPU of one or two that
let no other start early: where a token is decoded they cost more than the numbers do. XLA makes one
of them by itself on a CPU.
"""

import dataclasses

import keras
from keras import ops

from keras_bitnet.kernels import select


@dataclasses.dataclass(frozen=True)
class Norm:
    """The static facts of a norm over the last axis.

    Attributes:
        dtype: Dtype of the numbers.
        gradient: Whether PyTorch records the operation for a gradient.
        device: Where the numbers are, or `None` when not known.
        static_shape: Whether the shape of the numbers is known while tracing.
    """

    dtype: str
    gradient: bool
    device: str | None
    static_shape: bool = True

    @classmethod
    def of(cls, x, scale):
        """Reads the facts off numbers `(..., features)` and their scale `(features,)`."""
        gradient = False
        if keras.backend.backend() == "torch":
            import torch

            gradient = torch.is_grad_enabled() and (x.requires_grad or scale.requires_grad)
        dtype = keras.backend.standardize_dtype(x.dtype)
        static = all(isinstance(size, int) for size in x.shape)
        return cls(dtype, gradient, select.device_of(x), static)


def rms_norm(x, scale, epsilon):
    """`x / sqrt(mean(x ** 2) + epsilon) * scale` over the last axis, in `float32`.

    Args:
        x: Float tensor `(..., features)`.
        scale: Float tensor `(features,)`.
        epsilon: Added to the mean.

    Returns:
        Tensor of the shape and dtype of `x`.
    """
    scale = ops.convert_to_tensor(scale)
    table = TABLES.get(keras.backend.backend(), (REFERENCE,))
    # What is forced is the kernel of the products: a norm that needs a gradient is no error.
    row = select.first_or_forced(table, Norm.of(x, scale), strict=False)
    return row.run(x, scale, epsilon)


def _jax_cuda():
    from keras_bitnet.kernels.cuda import jax_norm

    return jax_norm.CUDA


def _torch_cuda():
    from keras_bitnet.kernels.cuda import torch_norm

    return torch_norm.CUDA


def _torch():
    from keras_bitnet.kernels import torch_norm

    return torch_norm.NATIVE


def _tensorflow():
    from keras_bitnet.kernels import tensorflow_norm

    return tensorflow_norm.NATIVE


def _reference(x, scale, epsilon):
    return ops.rms_normalization(x, scale=scale, axis=-1, epsilon=epsilon)


REFERENCE = select.Kernel("reference", lambda problem: None, _reference)

TABLES: dict[str, tuple[select.Kernel, ...]] = {
    "jax": (select.later("cuda", _jax_cuda), REFERENCE),
    "torch": (select.later("cuda", _torch_cuda), select.later("native", _torch), REFERENCE),
    "tensorflow": (select.later("native", _tensorflow), REFERENCE),
}
