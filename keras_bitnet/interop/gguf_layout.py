"""Fitting codes to GGUF types, and the order of the heads in them."""

import numpy as np

from keras_bitnet.interop.codecs import BLOCK_TYPES, i2_s
from keras_bitnet.interop.weights import Codes


def fit_codes(quantized, name, block, tensor):
    """The codes and scale by which a GGUF type stands for the same weights, exactly.

    Its grid may be shifted, or twice as fine: `+-1/2` times `s` is `+-1` times `s / 2`.

    Args:
        quantized: `Codes`.
        name: Name of the type, for the message.
        block: `BlockType`.
        tensor: Name of the tensor, for the message.

    Returns:
        `Codes` of the type.

    Raises:
        ValueError: The type has too few levels, or its rows or groups do not fit.
    """
    codes, scale, offset = quantized
    factor = 1 if float(offset - block.offset).is_integer() else 2
    # Few levels: look up the new code of each.
    old = np.unique(codes).astype(np.float64)
    new = factor * (old + offset) - block.offset
    # A code that is not used shows nothing, so only those that occur must fit.
    if not ((new >= 0) & (new < block.code_count) & (new == np.floor(new))).all():
        levels = sorted({float(level) for level in old + offset})
        raise ValueError(
            f"The GGUF type '{name}' cannot hold the levels {_short(levels)} of '{tensor}'. "
            f"Export with type='q8_0', which holds every level of up to 8 bits, or 'f16'."
        )
    table = np.zeros(256, np.uint8)
    table[old.astype(np.uint8)] = new.astype(np.uint8)
    return Codes(table[codes], scale / np.float32(factor), block.offset)


def _short(levels):
    shown = ", ".join(f"{level:g}" for level in levels[:6])
    return f"[{shown}{', ...' if len(levels) > 6 else ''}]"


def block_scales(scale, in_features, block, tensor):
    """Spreads scales `(out or 1, groups or 1)` to one for each block of a row.

    Raises:
        ValueError: Groups end within a block.
    """
    groups = scale.shape[1]
    if groups == 1:
        return scale
    group_size = -(-in_features // groups)
    if group_size % block.block_size or in_features % group_size:
        raise ValueError(
            f"The GGUF type '{block.name}' has blocks of {block.block_size} inputs; the weights of "
            f"'{tensor}' have a scale for every {group_size}. Export with type='q8_0' or 'f16'."
        )
    return np.repeat(scale, group_size // block.block_size, axis=1)


def check_rows(in_features, name, tensor):
    """Refuses rows that the type cannot cut in blocks.

    Raises:
        ValueError: `in_features` is no multiple of its block size.
    """
    size = i2_s.RUN if name == i2_s.NAME else BLOCK_TYPES[name].block_size
    if in_features % size:
        fits = [block.name for block in BLOCK_TYPES.values() if in_features % block.block_size == 0]
        raise ValueError(
            f"The GGUF type '{name}' needs a multiple of {size} inputs. Received: {in_features} in "
            f"'{tensor}'. This size fits {[*fits, 'f16']}."
        )


def permute_heads(rows, heads):
    """The rows `(out, ...)` of queries or keys in the order of GGUF's `"llama"`.

    There the two numbers that a rotary embedding turns stand side by side, here half a head
    apart.
    """
    if not heads or rows.shape[0] == 1:
        return rows
    split = rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:])
    return np.ascontiguousarray(split.swapaxes(1, 2).reshape(rows.shape))


def restore_heads(rows, heads):
    """The inverse of `permute_heads`."""
    if not heads or rows.shape[0] == 1:
        return rows
    split = rows.reshape(heads, rows.shape[0] // heads // 2, 2, *rows.shape[1:])
    return np.ascontiguousarray(split.swapaxes(1, 2).reshape(rows.shape))
