"""The packed matmul, run by the best kernel that can."""

from keras import ops

from keras_bitnet.kernels import select


def bit_matmul(
    x, packed, activation_quantizer=None, bias=None, activation_scale=None, norm=None, window=None
):
    """Multiplies activations by a packed weight.

        y = dequantize(quantize(normalize(patches(x)))) @ dequantize(packed) + bias

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
        window: `keras_bitnet.ops.window.Window` of a convolution, whose patches of `x`, then images
            `(..., *spatial, channels)`, are the activations; or `None`. A kernel that can gather
            patches does so, and they never lie in memory.

    Returns:
        Tensor `(..., out_features)` of the dtype of `x`; with a window
        `(..., *output spatial, out_features)`.

    Raises:
        ValueError: The last axis of `x` is not `in_features`, `x` is not float, or the forced
            kernel cannot run this case.
    """
    if not ops.is_tensor(x):  # Keras takes microseconds to hand a tensor back
        x = ops.convert_to_tensor(x)
    kernel = select.choose(x, packed, activation_quantizer, window)
    operands = packed, activation_quantizer, bias, activation_scale
    normalizes = norm is None or kernel.normalizes(activation_quantizer)
    if window is not None and not (normalizes and kernel.gathers()):
        x, window = window.patches(x), None
    if not normalizes:
        from keras_bitnet.kernels.norm import rms_norm  # its table is made of what imports this

        x, norm = rms_norm(x, *norm), None
    if window is not None:
        return kernel.run(x, *operands, norm, window)
    return kernel.run(x, *operands) if norm is None else kernel.run(x, *operands, norm)
