"""What the operators of PyTorch share: definition, shapes for tracing, checks, a gradient."""

import keras
import torch

from keras_bitnet.kernels.cpu import gradients
from keras_bitnet.ops.packed_tensor import PackedTensor

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # as the libraries number them
# What a `torch.library.Library` defines goes away with it.
library = torch.library.Library("keras_bitnet", "FRAGMENT")
_NONE = torch.empty(0)


def define(schema, run, device, fake, gradient=None, context=None):
    """Defines an operator `keras_bitnet::name`.

    Args:
        schema: Its name and types, `"name(Tensor x, ...) -> Tensor"`.
        run: What it computes.
        device: Where, as the dispatcher says: `"CPU"`, `"CUDA"`, `"MPS"`.
        fake: The same for tensors without data.
        gradient, context: See `torch.library.register_autograd`.
    """
    name = f"keras_bitnet::{schema.partition('(')[0]}"
    library.define(schema)
    library.impl(name, run, device)
    torch.library.register_fake(name, fake)
    if gradient is not None:
        torch.library.register_autograd(name, gradient, setup_context=context)


def missing(like):
    """An operand that is not given, beside another: a constant where no program is traced."""
    return torch.empty(0, device=like.device) if torch.compiler.is_compiling() else _NONE


def fake_like(x, *others):
    """The result of an operator that has the shape and dtype of its first operand."""
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def matmul_schema(weights, bias):
    """What the schema of an operator that multiplies by so many packed weights says of each.

    Args:
        weights: How many.
        bias: The type of a bias, `"Tensor"` or `"Tensor?"`.

    Returns:
        `(tensors, sizes, results)`: tiles, scales and biases, and numbers of outputs, both with a
        comma at the end.
    """
    ends = [""] if weights == 1 else [f"_{i}" for i in range(weights)]
    tensors = "".join(f"Tensor tiles{i}, Tensor scale{i}, {bias} bias{i}, " for i in ends)
    sizes = "".join(f"int out_features{i}, " for i in ends)
    results = "Tensor" if weights == 1 else f"({', '.join(['Tensor'] * weights)})"
    return tensors, sizes, results


def matmul_operands(operands, weights, shared=1):
    """The operands of such an operator.

    Args:
        operands: All of them.
        weights: How many weights.
        shared: How many tensors follow those of the weights.

    Returns:
        `(x, tensors, others, sizes, numbers)`: `(tiles, scale, bias)` of each weight, the tensors
        that follow, outputs of each weight, and the numbers that all share.
    """
    x, *others = operands
    tensors = [others[3 * i : 3 * i + 3] for i in range(weights)]
    others = others[3 * weights :]
    end = shared + weights
    return x, tensors, others[:shared], others[shared:end], others[end:]


def fake_matmul(*operands, weights=1):
    """The results of such an operator, of one weight a tensor."""
    x, _, _, sizes, _ = matmul_operands(operands, weights)
    results = tuple(x.new_empty((*x.shape[:-1], size)) for size in sizes)
    return results if weights > 1 else results[0]


def matmul_context(ctx, inputs, output, weights=1):
    """Keeps what `matmul_gradient` needs, of an operator whose weights lie in tiles."""
    x, tensors, _, sizes, numbers = matmul_operands(inputs, weights)
    bits, group_size, _, _, offset, _ = numbers
    ctx.save_for_backward(*(tensor for weight in tensors for tensor in weight[:2]))
    ctx.has_bias = [bias is not None for *_, bias in tensors]
    ctx.facts = [(offset, bits, x.shape[-1], size, group_size or None) for size in sizes]


def matmul_gradient(ctx, *dys):
    """The gradient of such an operator with respect to activations and biases."""
    dweights = []
    with keras.device(str(dys[0].device)):  # where it ran, whatever Keras's default device
        dx, dbiases = gradients(dys, saved_weights(ctx))
    for dbias, given in zip(dbiases, ctx.has_bias, strict=True):
        dweights += [None, None, dbias if given else None]
    return dx, *dweights, *[None] * (len(dys) + 7)


def saved_weights(ctx):
    """The `PackedTensor`s of the tiles and scales that a context saved first, by its `facts`."""
    saved = ctx.saved_tensors
    return [PackedTensor(*saved[2 * i : 2 * i + 2], *facts) for i, facts in enumerate(ctx.facts)]


def pointer(tensor):
    """Where the elements of a tensor lie, `None` of `None`."""
    return None if tensor is None else tensor.data_ptr()


def check(device, wanted):
    """Checks operands: a graph that was saved and loaded may bring what the package never saw.

    Args:
        device: Where they must be.
        wanted: `(name, tensor or None, dtype, accepted shapes)` of each.

    Raises:
        ValueError: One is of another dtype or shape, elsewhere, or not contiguous.
    """
    for name, tensor, dtype, shapes in wanted:
        if tensor is None:
            continue
        right = tensor.dtype == dtype and tuple(tensor.shape) in shapes
        if not right or tensor.device != device or not tensor.is_contiguous():
            raise ValueError(
                f"`{name}` must be a contiguous {dtype} tensor on {device} of one of the shapes "
                f"{shapes}. Received: {tensor.dtype} tensor on {tensor.device} of shape "
                f"{tuple(tensor.shape)}"
            )
