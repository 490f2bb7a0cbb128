"""The packed matmul, run by the best kernel that can."""

from keras import ops

from keras_bitnet.kernels import select


def bit_matmul(x, packed, activation_quantizer=None, bias=None, activation_scale=None, norm=None):
    """Multiplies activations by a packed weight.

        y = dequantize(quantize(normalize(x))) @ dequantize(packed) + bias

    The sums over integers are exact and equal bit for bit on every backend, device and kernel;
    the scales are applied in float32. The gradient with respect to `x` is straight-through.

    Args:
        x: Float tensor `(..., in_features)`.
        packed: `keras_bitnet.ops.PackedTensor`.
        activation_quantizer: `ActivationQuantizer`, or `None`: `x` stays float.
        bias: Tensor `(out_features,)` or `None`.
        activation_scale: `float32` scalar tensor where the quantizer is static, else `None`.
        norm: `(gain, epsilon)` of a root mean square norm, a gain `(in_features,)`, or `None`: `x`
            is taken as it is. A kernel that can do both reads `x` once.

    Returns:
        Tensor `(..., out_features)` of the dtype of `x`.

    Raises:
        ValueError: The last axis of `x` is not `in_features`, `x` is not float, or the forced
            kernel cannot run this case.
    """
    if not ops.is_tensor(x):  # Keras takes microseconds to hand a tensor back
        x = ops.convert_to_tensor(x)
    kernel = select.choose(x, packed, activation_quantizer)
    operands = packed, activation_quantizer, bias, activation_scale
    if norm is None:
        return kernel.run(x, *operands)
    if kernel.normalizes(activation_quantizer):
        return kernel.run(x, *operands, norm)
    from keras_bitnet.kernels.norm import rms_norm  # its table is made of what imports this module

    return kernel.run(rms_norm(x, *norm), *operands)
