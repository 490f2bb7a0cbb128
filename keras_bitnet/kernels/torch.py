"""The native CPU kernels for PyTorch: operators of a product, of joint ones and a convolution."""

import ctypes
import functools
import math

import keras
import torch
from keras import ops

from keras_bitnet.kernels import cpu, native, torch_operators
from keras_bitnet.kernels.select import Kernel
from keras_bitnet.kernels.torch_operators import (
    DTYPES,
    matmul_operands,
    matmul_schema,
    missing,
    saved_weights,
)
from keras_bitnet.ops.window import Window


def _schema(weights, more=""):
    """What an operator takes that multiplies the same activations by so many weights, and gives."""
    tensors, sizes, results = matmul_schema(weights, "Tensor")
    return (
        f"(Tensor x, {tensors}Tensor x_scale, Tensor gain, {sizes}int bits, int trits, "
        "int group_size, int activation_bits, bool per_tensor, float offset, float epsilon, "
        f"float norm_epsilon{more}) -> {results}"
    )


_WINDOW = ", int axes, int padding" + "".join(
    f", int {name}_{axis}" for name in ("size", "stride", "dilation") for axis in range(3)
)
# Operators of the library by name: what they take, and of how many weights.
_OPERATORS = {
    "bit_matmul": (_schema(1), 1),
    "bit_matmul_2": (_schema(2), 2),
    "bit_matmul_3": (_schema(3), 3),
    "bit_conv": (_schema(1, _WINDOW), 1),
}


def run(x, packed, activation_quantizer, bias, activation_scale=None, norm=None, window=None):
    """As `keras_bitnet.ops.bit_matmul`, for a problem that was not refused."""
    none = missing(x)
    x_scale = none if activation_scale is None else ops.reshape(activation_scale, (1,))
    gain, norm_epsilon = none, 0.0
    if norm is not None:
        gain, norm_epsilon = _beside(x, norm[0]).float(), norm[1]
    operators, numbers = torch.ops.keras_bitnet, () if window is None else window.numbers
    operator = operators.bit_matmul.default if window is None else operators.bit_conv.default
    return operator(
        x.contiguous(),
        *_weight(packed, bias, x, none),
        x_scale,
        gain,
        packed.out_features,
        *_attributes(packed, activation_quantizer),
        norm_epsilon,
        *numbers,
    )


def run_joint(x, packed, activation_quantizer, biases):
    """As `keras_bitnet.ops.joint_bit_matmul`, for two or three weights that are alike."""
    operators = {2: torch.ops.keras_bitnet.bit_matmul_2, 3: torch.ops.keras_bitnet.bit_matmul_3}
    if len(packed) not in operators:
        return None
    none = missing(x)
    weights = [_weight(w, bias, x, none) for w, bias in zip(packed, biases, strict=True)]
    return operators[len(packed)].default(
        x.contiguous(),
        *(tensor for weight in weights for tensor in weight),
        none,
        none,
        *(weight.out_features for weight in packed),
        *_attributes(packed[0], activation_quantizer),
        0.0,
    )


def _weight(packed, bias, x, none):
    """The operands of one weight."""
    bias = none if bias is None else _beside(x, bias).float()
    return _beside(x, packed.tiles), _beside(x, packed.scale), bias


def _attributes(packed, activation_quantizer):
    """The numbers of a product from `bits` to `epsilon`."""
    activations = cpu.Activations.of(activation_quantizer)
    trits, group_size = int(packed.layout == "trits"), packed.group_size or 0
    bits, per_tensor, epsilon = activations
    return packed.bits, trits, group_size, bits, per_tensor, packed.offset, epsilon


def _beside(x, array):
    """A tensor, variable or array as a contiguous tensor on the device of `x`."""
    # Keras takes microseconds to hand a tensor back.
    if isinstance(array, torch.Tensor):
        tensor = array
    else:
        tensor = array.value if isinstance(array, keras.Variable) else ops.convert_to_tensor(array)
    if tensor.device != x.device:
        tensor = tensor.to(x.device)
    return tensor.contiguous()


def _setup_context(ctx, inputs, output, weights):
    x, tensors, (_, gain), sizes, numbers = matmul_operands(inputs, weights, shared=2)
    bits, trits, group_size, _, _, offset, _, ctx.norm_epsilon, *window = numbers
    ctx.window = Window.of_numbers(window) if window else None
    ctx.has_bias, ctx.has_gain = [bias.shape[0] > 0 for *_, bias in tensors], gain.shape[0] > 0
    saved = (x, gain) if ctx.has_gain else (x,) if window else ()
    ctx.save_for_backward(*(tensor for weight in tensors for tensor in weight[:2]), *saved)
    layout = "trits" if trits else "tiles"
    in_features = x.shape[-1] * (ctx.window.count if window else 1)
    ctx.facts = [(offset, bits, in_features, n, group_size or None, layout) for n in sizes]


def _backward(ctx, *dys):
    saved, weights = ctx.saved_tensors, len(dys)
    others, dweights = saved[2 * weights :], []
    with keras.device("cpu"):  # where the operator ran, whatever Keras's default device
        dx, dbiases = cpu.gradients(dys, saved_weights(ctx))
        for dbias, given in zip(dbiases, ctx.has_bias, strict=True):
            dweights += [None, None, dbias if given else dbias.new_zeros(0)]
        dgain = dys[0].new_zeros(0, dtype=torch.float32)
        if ctx.has_gain:
            x, gain = others
            x = x if ctx.window is None else ctx.window.patches(x)
            dx, dgain = cpu.norm_gradients(dx, x, gain, ctx.norm_epsilon)
        if ctx.window is not None:
            dx = ctx.window.scatter(dx, others[0])
    return dx, *dweights, None, dgain, *[None] * (weights + (8 if ctx.window is None else 19))


def _run_through_ctypes(*operands, weights):
    """The operators where the library cannot define them, as on Windows."""
    x, tensors, (x_scale, gain), sizes, numbers = matmul_operands(operands, weights, shared=2)
    bits, trits, group_size, activation_bits, per_tensor, offset, epsilon, norm_epsilon, *window = (
        numbers
    )
    window = Window.of_numbers(window) if window else None
    placed = None if window is None else native.WindowStruct.of(window, x.shape)
    results = _empty_results(x, sizes, window)
    structs = [
        native.MatmulStruct(
            rows=math.prod(y.shape[:-1]),
            in_features=x.shape[-1] * (1 if window is None else window.count),
            out_features=out_features,
            group_size=group_size,
            bits=bits,
            layout=trits,
            dtype=DTYPES[x.dtype],
            activation_bits=activation_bits,
            per_tensor=per_tensor,
            offset=offset,
            epsilon=epsilon,
            norm_epsilon=norm_epsilon,
            scale_columns=scale.shape[1],
            x=x.data_ptr(),
            tiles=tiles.data_ptr(),
            scale=scale.data_ptr(),
            bias=bias.data_ptr() if bias.numel() else None,
            x_scale=x_scale.data_ptr() if x_scale.numel() else None,
            window=None if placed is None else ctypes.addressof(placed),
            gain=gain.data_ptr() if gain.numel() else None,
            y=y.data_ptr(),
        )
        for (tiles, scale, bias), out_features, y in zip(tensors, sizes, results, strict=True)
    ]
    joint = native.JointStruct.of(structs)
    wrong = native.library().kbn_run_limited(ctypes.byref(joint), torch.get_num_threads())
    if wrong is not None:
        raise RuntimeError(f"keras_bitnet: {wrong.decode()}")
    return results if weights > 1 else results[0]


def _fake(*operands, weights):
    x, _, _, sizes, numbers = matmul_operands(operands, weights, shared=2)
    results = _empty_results(x, sizes, Window.of_numbers(numbers[8:]) if numbers[8:] else None)
    return results if weights > 1 else results[0]


def _empty_results(x, sizes, window):
    rows = x.shape[:-1] if window is None else window.positions(x.shape)
    return tuple(x.new_empty((*rows, size)) for size in sizes)


def _define(library):
    """Defines the operators: in the library where it can, else here. Returns whether it could."""
    library.kbn_run_limited.restype = ctypes.c_char_p
    register = getattr(library, "kbn_torch_register", None)  # not built on Windows
    registered = register is not None and register() == 0
    for name, (schema, weights) in _OPERATORS.items():
        operator, of_weights = f"keras_bitnet::{name}", {"weights": weights}
        if not registered:
            torch_operators.library.define(name + schema)
            run = functools.partial(_run_through_ctypes, **of_weights)
            torch_operators.library.impl(operator, run, "CPU")
        torch.library.register_fake(operator, functools.partial(_fake, **of_weights))
        context = functools.partial(_setup_context, **of_weights)
        torch.library.register_autograd(operator, _backward, setup_context=context)
    return registered


# Whether the library defined its operators by itself; those without a stand-in need that.
REGISTERED = native.library() is not None and _define(native.library())


def not_registered():
    """Why it did not."""
    return cpu.NO_LIBRARY or f"PyTorch {torch.__version__} lacks the stable C functions"


NATIVE = Kernel(
    cpu.NAME,
    cpu.refuse,
    run,
    normalizes=cpu.normalizes,
    gathers=lambda: True,
    run_joint=run_joint,
)
