"""What the CUDA rows of JAX and PyTorch share: which problems the kernels take."""

from keras_bitnet.kernels.cpu import refuse_attention_operands

NAME = "cuda"
DTYPES = ("float32", "bfloat16", "float16")
MOST_INPUTS = 98_304  # a row of activations lies in the shared memory of every GPU
MOST_OUTPUTS = 2_000_000
MOST_HEAD_DIM = 256


def refuse(problem):
    """Why no CUDA kernel computes a problem, whatever the GPU, or `None`.

    Args:
        problem: `keras_bitnet.kernels.Problem`; its device is the row's business.
    """
    if problem.layout != "tiles":
        return f"weights in the layout {problem.layout!r}; accepted: 'tiles'"
    if problem.activation_bits is None:
        return "the activations are float: the kernel multiplies integers"
    if problem.activation_bits not in (4, 8):
        return f"activations of {problem.activation_bits} bits; accepted: 4, 8"
    if problem.activation_formula != "absmax":
        return f"activations quantized by {problem.activation_formula}; accepted: absmax"
    if problem.activation_granularity not in ("token", "tensor", "static"):
        return f"activation granularity {problem.activation_granularity!r}"
    if problem.dtype not in DTYPES:
        return f"activations of dtype {problem.dtype}; accepted: {', '.join(DTYPES)}"
    if problem.group_size is not None and problem.group_size % 32:
        return f"group_size={problem.group_size} is not a multiple of 32"
    # In such rows int32 sums of 8-bit codes and activations cannot overflow either.
    if problem.in_features > MOST_INPUTS:
        return f"{problem.in_features} inputs; accepted: at most {MOST_INPUTS}"
    if problem.out_features > MOST_OUTPUTS:
        return f"{problem.out_features} outputs; accepted: at most {MOST_OUTPUTS}"
    return None


def refuse_attention(problem):
    """Why no CUDA kernel computes an attention, whatever the GPU, or `None`.

    Args:
        problem: `keras_bitnet.kernels.attention.Attention`.
    """
    reason = refuse_attention_operands(problem)
    if reason is not None:
        return reason
    if problem.head_dim % 4 or problem.head_dim > MOST_HEAD_DIM:
        return f"heads of size {problem.head_dim}; accepted: multiples of 4 up to {MOST_HEAD_DIM}"
    return None
