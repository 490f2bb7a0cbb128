"""The host side of `matmul.metal`: what is allocated, passed and started, and a check of it all."""

import functools
import pathlib

import keras
import numpy as np
import torch

from keras_bitnet.ops import layout
from keras_bitnet.ops.packed_tensor import PackedTensor
from keras_bitnet.ops.reference import reference_matmul, step
from keras_bitnet.quantizers.activations import ActivationInt8

SOURCE = pathlib.Path(__file__).with_name("matmul.metal")

# As in the shader.
_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_GRANULARITIES = {"token": 0, "tensor": 1, "static": 2}
_QUANTIZE_THREADS = 256
_MATMUL_THREADS = 128
_ROWS = 4


@functools.cache
def library():
    """The compiled shader: an attribute for each kernel."""
    return torch.mps.compile_shader(SOURCE.read_text("ascii"))


@functools.cache
def obstacle():
    """Why the kernels cannot run in this process, or `None`; compiles and checks them."""
    if not torch.backends.mps.is_available():
        return "PyTorch finds no Apple GPU (MPS) on this machine"
    if not hasattr(torch.mps, "compile_shader"):
        return f"PyTorch {torch.__version__} has no `torch.mps.compile_shader`"
    try:
        return check(library(), "mps")
    except (RuntimeError, SyntaxError) as error:
        return f"the shader does not compile or run: {error}"


def check(shader, device):
    """Compares the kernels with the reference on one small case each.

    Args:
        shader: What `library` gives.
        device: Where the operands are put.

    Returns:
        What is wrong, or `None`.
    """
    rng = np.random.default_rng(0)
    inputs, outputs, quantizer = 100, 33, ActivationInt8()
    for bits in layout.BITS:
        codes, offset = rng.integers(0, 2**bits, (inputs, outputs)), -(2**bits - 1) / 2
        for rows, group_size in ((1, None), (5, None), (1, 32), (5, 32)):
            groups = 1 if group_size is None else -(-inputs // group_size)
            scale = rng.random((groups, outputs))
            record = PackedTensor.from_codes(codes, scale, offset, bits, group_size)
            x = torch.tensor(rng.normal(size=(rows, inputs)), dtype=torch.float32)
            with keras.device("cpu"):
                wanted = reference_matmul(x, record, quantizer)
            y = matmul(
                shader, x.to(device), torch.tensor(record.tiles, device=device),
                torch.tensor(record.scale, device=device), None, None, outputs, bits,
                group_size or 0, quantizer.bits, quantizer.granularity, offset, quantizer.epsilon,
            )  # fmt: skip
            error = (y.cpu() - wanted).abs().max() / wanted.abs().max()
            if not error < 1e-5:
                return (
                    f"the shader is wrong on this GPU: relative error {error:.1e} with {bits} "
                    f"bits, {rows} rows, group_size={group_size}"
                )
    return None


def matmul(
    shader, x, tiles, scale, bias, activation_scale, out_features, bits, group_size,
    activation_bits, granularity, offset, epsilon,
):  # fmt: skip
    """Starts the kernels of one packed matmul.

    Args:
        shader: Holds the kernels; each is called as one of `torch.mps.compile_shader` is.
        x: Contiguous float tensor `(..., in_features)`.
        tiles: `uint8` tensor, see `keras_bitnet.ops.layout`.
        scale: `float32` tensor `(1 or groups, 1 or out_features)`.
        bias: `float32` tensor `(out_features,)` or `None`.
        activation_scale: `float32` scalar tensor where `granularity` is `"static"`, else `None`.
        out_features: Outputs.
        bits: Storage bits of a weight.
        group_size: Inputs that share a scale, or 0.
        activation_bits: 4 or 8.
        granularity: `"token"`, `"tensor"` or `"static"`.
        offset: `w = scale * (code + offset)`.
        epsilon: Lower bound of the largest activation.

    Returns:
        Tensor `(..., out_features)` of the dtype of `x`.
    """
    y = x.new_empty((*x.shape[:-1], out_features))
    rows = y.numel() // out_features
    if rows == 0:
        return y
    tiles, scale = _aligned(tiles), scale.contiguous()
    tile_columns, tile_count = tiles.shape[:2]
    inputs = layout.tile_inputs(bits)
    stride = tile_count * inputs
    highest = 2 ** (activation_bits - 1) - 1
    codes, x_scale = _quantize(
        shader, x, rows, stride, highest, granularity, activation_scale, epsilon
    )
    block = 1 if rows == 1 else _ROWS
    kernel = getattr(shader, f"{'grouped' if group_size else 'matmul'}_{bits}_{block}")
    factor = step(offset)
    kernel(
        codes,
        x_scale,
        tiles,
        scale,
        scale if bias is None else bias.contiguous(),
        y,
        [rows, out_features, stride, tile_count, group_size // inputs, scale.shape[1],
         int(bias is not None), _DTYPES[x.dtype]],
        [float(factor), factor * (offset - 1024.0), 1.0 / factor],
        threads=[tile_columns * _MATMUL_THREADS, -(-rows // block)],
        group_size=[_MATMUL_THREADS, 1],
    )  # fmt: skip
    return y


def _quantize(shader, x, rows, stride, highest, granularity, activation_scale, epsilon):
    """The codes of the activations, halves `(rows, stride)`, and the scale of each row."""
    codes = x.new_empty((rows, stride), dtype=torch.float16)
    scales = x.new_empty(rows, dtype=torch.float32)
    largest = x.new_empty(rows, dtype=torch.int32)
    sizes = [rows, x.shape[-1], stride, _DTYPES[x.dtype], _GRANULARITIES[granularity]]
    grid = {"threads": rows * _QUANTIZE_THREADS, "group_size": _QUANTIZE_THREADS}
    if granularity == "tensor":
        shader.find_largest(x, largest, sizes, **grid)
    shader.quantize(
        x,
        codes,
        scales,
        largest,
        scales if activation_scale is None else activation_scale,
        sizes,
        [float(highest), 1.0 / highest, epsilon],
        **grid,
    )
    return codes, scales


def _aligned(tiles):
    """The tiles where the shader can read 16 bytes at once."""
    tiles = tiles.contiguous()
    return tiles if tiles.storage_offset() % 16 == 0 else tiles.clone()
