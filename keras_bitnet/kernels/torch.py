"""The native CPU kernels for PyTorch: two operators, of a product and a convolution."""

import ctypes

import keras
import torch
from keras import ops

from keras_bitnet.kernels import cpu, native, torch_operators
from keras_bitnet.kernels.select import Kernel
from keras_bitnet.kernels.torch_operators import DTYPES, missing
from keras_bitnet.ops.packed_tensor import PackedTensor
from keras_bitnet.ops.window import Window

_OPERANDS = (
    "(Tensor x, Tensor tiles, Tensor scale, Tensor bias, Tensor x_scale, Tensor gain, "
    "int out_features, int bits, int trits, int group_size, int activation_bits, "
    "bool per_tensor, float offset, float epsilon, float norm_epsilon"
)
_WINDOW = ", int axes, int padding" + "".join(
    f", int {name}_{axis}" for name in ("size", "stride", "dilation") for axis in range(3)
)
# Operators of the library, and what they take. That of a convolution takes a window too.
_SCHEMAS = {
    "bit_matmul": f"{_OPERANDS}) -> Tensor",
    "bit_conv": f"{_OPERANDS}{_WINDOW}) -> Tensor",
}


def run(x, packed, activation_quantizer, bias, activation_scale=None, norm=None, window=None):
    """As `keras_bitnet.ops.bit_matmul`, for a problem that was not refused."""
    none = missing(x)
    x_scale = none if activation_scale is None else ops.reshape(activation_scale, (1,))
    bias = none if bias is None else ops.cast(bias, "float32")
    gain, norm_epsilon = norm or (none, 0.0)
    activations = cpu.Activations.of(activation_quantizer)
    operators, numbers = torch.ops.keras_bitnet, () if window is None else window.numbers
    operator = operators.bit_matmul.default if window is None else operators.bit_conv.default
    return operator(
        x.contiguous(),
        _contiguous(packed.tiles),
        _contiguous(packed.scale),
        bias.contiguous(),
        x_scale,
        _contiguous(gain).to(torch.float32),
        packed.out_features,
        packed.bits,
        int(packed.layout == "trits"),
        packed.group_size or 0,
        activations.bits,
        activations.per_tensor,
        packed.offset,
        activations.epsilon,
        norm_epsilon,
        *numbers,
    )


def _contiguous(array):
    # Asked first, as Keras takes a microsecond to hand a tensor back as it is.
    tensor = array if isinstance(array, torch.Tensor) else ops.convert_to_tensor(array)
    return tensor.contiguous()


def _setup_context(ctx, inputs, output):
    x, tiles, scale, bias, _, gain, out_features, bits, trits, group_size, _, _, *others = inputs
    offset, _, ctx.norm_epsilon, *numbers = others
    ctx.window = Window.of_numbers(numbers) if numbers else None
    ctx.has_bias, ctx.has_gain = bias.shape[0] > 0, gain.shape[0] > 0
    saved = (x, gain) if ctx.has_gain else (x,) if numbers else ()
    ctx.save_for_backward(tiles, scale, *saved)
    layout = "trits" if trits else "tiles"
    in_features = x.shape[-1] * (ctx.window.count if numbers else 1)
    ctx.facts = (offset, bits, in_features, out_features, group_size or None, layout)


def _backward(ctx, dy):
    tiles, scale, *saved = ctx.saved_tensors
    with keras.device("cpu"):  # where the operator ran, whatever Keras's default device
        dx, dbias = cpu.gradients(dy, PackedTensor(tiles, scale, *ctx.facts))
        dgain = dbias.new_zeros(0)
        if ctx.has_gain:
            x, gain = saved
            x = x if ctx.window is None else ctx.window.patches(x)
            dx, dgain = cpu.norm_gradients(dx, x, gain, ctx.norm_epsilon)
        if ctx.window is not None:
            dx = ctx.window.scatter(dx, saved[0])
    if not ctx.has_bias:
        dbias = dbias.new_zeros(0)
    return dx, None, None, dbias, None, dgain, *[None] * (9 if ctx.window is None else 20)


def _run_through_ctypes(
    x, tiles, scale, bias, x_scale, gain, out_features, bits, trits, group_size, activation_bits,
    per_tensor, offset, epsilon, norm_epsilon, *numbers,
):  # fmt: skip
    """The operators for a PyTorch without the stable C functions that the library needs."""
    y = _empty_result(x, out_features, numbers)
    window = Window.of_numbers(numbers) if numbers else None
    placed = None if window is None else native.WindowStruct.of(window, x.shape)
    problem = native.MatmulStruct(
        rows=y.numel() // out_features,
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
    library = native.library()
    wrong = library.kbn_run_limited(ctypes.byref(problem), torch.get_num_threads())
    if wrong is not None:
        raise RuntimeError(f"keras_bitnet: {wrong.decode()}")
    return y


def _fake(
    x, tiles, scale, bias, x_scale, gain, out_features, bits, trits, group_size, activation_bits,
    per_tensor, offset, epsilon, norm_epsilon, *numbers,
):  # fmt: skip
    return _empty_result(x, out_features, numbers)


def _empty_result(x, out_features, numbers):
    rows = Window.of_numbers(numbers).positions(x.shape) if numbers else x.shape[:-1]
    return x.new_empty((*rows, out_features))


def _define(library):
    """Defines the operators: in the library where it can, else here. Returns whether it could."""
    library.kbn_run_limited.restype = ctypes.c_char_p
    register = getattr(library, "kbn_torch_register", None)  # not built on Windows
    registered = register is not None and register() == 0
    for name, schema in _SCHEMAS.items():
        operator = f"keras_bitnet::{name}"
        if not registered:
            torch_operators.library.define(name + schema)
            torch_operators.library.impl(operator, _run_through_ctypes, "CPU")
        torch.library.register_fake(operator, _fake)
        torch.library.register_autograd(operator, _backward, setup_context=_setup_context)
    return registered


# Whether the library defined its operators by itself; those without a stand-in need that.
REGISTERED = native.library() is not None and _define(native.library())


def not_registered():
    """Why it did not."""
    return cpu.NO_LIBRARY or f"PyTorch {torch.__version__} lacks the stable C functions"


NATIVE = Kernel(cpu.NAME, cpu.refuse, run, normalizes=cpu.normalizes, gathers=lambda: True)
