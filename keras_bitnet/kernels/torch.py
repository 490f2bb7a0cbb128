"""The native CPU kernels for PyTorch: the operator `keras_bitnet::bit_matmul` and its gradient."""

import ctypes

import keras
import torch
from keras import ops

from keras_bitnet.kernels import cpu, native, torch_operators
from keras_bitnet.kernels.select import Kernel
from keras_bitnet.kernels.torch_operators import DTYPES, missing
from keras_bitnet.ops.packed_tensor import PackedTensor

_OPERATOR = "keras_bitnet::bit_matmul"
_SCHEMA = (
    "bit_matmul(Tensor x, Tensor tiles, Tensor scale, Tensor bias, Tensor x_scale, Tensor gain, "
    "int out_features, int bits, int trits, int group_size, int activation_bits, "
    "bool per_tensor, float offset, float epsilon, float norm_epsilon) -> Tensor"
)


def run(x, packed, activation_quantizer, bias, activation_scale=None, norm=None):
    """As `keras_bitnet.ops.bit_matmul`, for a problem that was not refused."""
    none = missing(x)
    x_scale = none if activation_scale is None else ops.reshape(activation_scale, (1,))
    bias = none if bias is None else ops.cast(bias, "float32")
    gain, norm_epsilon = norm or (none, 0.0)
    activations = cpu.Activations.of(activation_quantizer)
    return torch.ops.keras_bitnet.bit_matmul.default(
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
    )


def _contiguous(array):
    # Asked first, as Keras takes a microsecond to hand a tensor back as it is.
    tensor = array if isinstance(array, torch.Tensor) else ops.convert_to_tensor(array)
    return tensor.contiguous()


def _setup_context(ctx, inputs, output):
    x, tiles, scale, bias, _, gain, out_features, bits, trits, group_size, _, _, *others = inputs
    offset, _, ctx.norm_epsilon = others
    ctx.has_bias, ctx.has_gain = bias.shape[0] > 0, gain.shape[0] > 0
    ctx.save_for_backward(tiles, scale, *((x, gain) if ctx.has_gain else ()))
    layout = "trits" if trits else "tiles"
    ctx.facts = (offset, bits, x.shape[-1], out_features, group_size or None, layout)


def _backward(ctx, dy):
    tiles, scale, *normalized = ctx.saved_tensors
    with keras.device("cpu"):  # where the operator ran, whatever Keras's default device
        dx, dbias = cpu.gradients(dy, PackedTensor(tiles, scale, *ctx.facts))
        dgain = dbias.new_zeros(0)
        if ctx.has_gain:
            x, gain = normalized
            dx, dgain = cpu.norm_gradients(dx, x, gain, ctx.norm_epsilon)
    if not ctx.has_bias:
        dbias = dbias.new_zeros(0)
    return dx, None, None, dbias, None, dgain, *[None] * 9


def _run_through_ctypes(
    x, tiles, scale, bias, x_scale, gain, out_features, bits, trits, group_size, activation_bits,
    per_tensor, offset, epsilon, norm_epsilon,
):  # fmt: skip
    """The operator for a PyTorch without the stable C functions that the library registers with."""
    y = x.new_empty((*x.shape[:-1], out_features))
    problem = native.MatmulStruct(
        rows=y.numel() // out_features,
        in_features=x.shape[-1],
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
        gain=gain.data_ptr() if gain.numel() else None,
        y=y.data_ptr(),
    )
    library = native.library()
    wrong = library.kbn_run_limited(ctypes.byref(problem), torch.get_num_threads())
    if wrong is not None:
        raise RuntimeError(f"{_OPERATOR}: {wrong.decode()}")
    return y


def _fake(x, tiles, scale, bias, x_scale, gain, out_features, *attributes):
    return torch_operators.fake_matmul(x, tiles, scale, bias, x_scale, out_features)


def _define(library):
    """Defines the operator: in the library where it can, else here. Returns whether it could."""
    library.kbn_run_limited.restype = ctypes.c_char_p
    register = getattr(library, "kbn_torch_register", None)  # not built on Windows
    registered = register is not None and register() == 0
    if not registered:
        torch_operators.library.define(_SCHEMA)
        torch_operators.library.impl(_OPERATOR, _run_through_ctypes, "CPU")
    torch.library.register_fake(_OPERATOR, _fake)
    torch.library.register_autograd(_OPERATOR, _backward, setup_context=_setup_context)
    return registered


# Whether the library defined its operators by itself; those without a stand-in need that.
REGISTERED = native.library() is not None and _define(native.library())


def not_registered():
    """Why it did not."""
    return cpu.NO_LIBRARY or f"PyTorch {torch.__version__} lacks the stable C functions"


NATIVE = Kernel(cpu.NAME, cpu.refuse, run, cpu.normalizes)
