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
    if x.shape[-1] is None and window is None:  # while TensorFlow traces; it checks as it runs
        x = ops.reshape(x, (*ops.shape(x)[:-1], packed.in_features))
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


def joint_bit_matmul(x, packed, activation_quantizer=None, biases=None):
    """Multiplies the same activations by several packed weights.

        [bit_matmul(x, p, activation_quantizer, b) for p, b in zip(packed, biases)]

    Where the weights are alike and a kernel can, it quantizes the activations once and is one
    operation: of a single row the calls take a good part of the time.

    Args:
        x: Float tensor `(..., in_features)`.
        packed: List of `keras_bitnet.ops.PackedTensor` of the same `in_features`.
        activation_quantizer: `ActivationQuantizer` that is not static, or `None`: `x` stays float.
        biases: List of tensors `(out_features,)` or `None`, one for each weight; none by default.

    Returns:
        List of tensors `(..., out_features)` of the dtype of `x`.

    Raises:
        ValueError: As `bit_matmul`.
    """
    if not ops.is_tensor(x):
        x = ops.convert_to_tensor(x)
    biases = biases or [None] * len(packed)
    kernels = {select.choose(x, weight, activation_quantizer) for weight in packed}
    alike = {(w.bits, w.offset, w.group_size, w.layout) for w in packed}
    if len(kernels) == len(alike) == 1:
        (kernel,) = kernels
        results = kernel.run_joint(x, packed, activation_quantizer, biases)
        if results is not None:
            return list(results)
    return [
        bit_matmul(x, weight, activation_quantizer, bias)
        for weight, bias in zip(packed, biases, strict=True)
    ]
