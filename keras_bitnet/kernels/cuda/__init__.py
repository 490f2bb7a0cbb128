"""What the CUDA rows of JAX and PyTorch share: which problems the kernels take."""

from keras_bitnet.kernels.cpu import refuse_attention_operands, refuse_formula, split

NAME = "cuda"
MOST_INPUTS = 98_304  # a row of codes lies in the shared memory of every GPU
PLANES = {"float32": 4, "bfloat16": 2, "float16": 2}  # rows of codes of a row that stays float
MOST_OUTPUTS = 2_000_000
MOST_HEAD_DIM = 256


def refuse(problem):
    """Why no CUDA kernel computes a problem, whatever the GPU, or `None`.

    Args:
        problem: `keras_bitnet.kernels.Problem`; its device is the row's business.
    """
    if problem.layout != "tiles":
        return f"weights in the layout {problem.layout!r}; accepted: 'tiles'"
    reason = refuse_formula(split(problem))
    if reason is not None:
        return reason
    # The sums of 8-bit codes wrap around, but what is left of them without the offset fits int32.
    most = MOST_INPUTS // (PLANES[problem.dtype] if problem.activation_bits is None else 1)
    if problem.in_features > most:
        return f"{problem.in_features} inputs; accepted: at most {most}"
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
