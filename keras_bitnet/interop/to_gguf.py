"""Models to GGUF files, for llama.cpp and bitnet.cpp."""

import dataclasses
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np

from keras_bitnet.checks import check_choice
from keras_bitnet.files import replacing
from keras_bitnet.interop import tensor_map, weights
from keras_bitnet.interop.codecs import BLOCK_TYPES, i2_s
from keras_bitnet.interop.files import require
from keras_bitnet.interop.gguf_layout import block_scales, check_rows, fit_codes, permute_heads
from keras_bitnet.interop.gguf_tokenizer import tokenizer_metadata
from keras_bitnet.interop.hf_config import activation_name, check_architecture
from keras_bitnet.interop.hugging_face import check_model, own_tokenizer
from keras_bitnet.layers.base import BitLayer

LLAMA, BITNET, BITNET_CPP = "llama", "bitnet", "bitnet-b1.58"
ARCHITECTURES = (LLAMA, BITNET, BITNET_CPP)
FLOAT_TYPES: dict[str, tuple[int, int, np.dtype]] = {
    "f32": (0, 0, np.dtype("<f4")),
    "f16": (1, 1, np.dtype("<f2")),
}  # id, file type
TYPES = (*BLOCK_TYPES, i2_s.NAME, *FLOAT_TYPES)
TABLE_TYPES = ("f32", "f16", "q8_0")


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A tensor of the file: what the header says, and a function that gives its bytes."""

    name: str
    shape: tuple
    type_id: int
    nbytes: int
    make: Callable[[], Any]


def to_gguf(
    model, path, *, type="tq2_0", arch="auto", embedding_type="f16", tokenizer=None, name=None
):
    """Writes a model as one GGUF file.

    Codes are written as they are, never through float. Where the weights of a tensor share one
    scale, blocks have scale 1 and the exact float32 scale stands in the tensor `<name>.scale`,
    by which llama.cpp multiplies; scales per channel or group are rounded to float16 in their
    blocks.

    | `type` | levels | inputs a multiple of | bits a weight |
    |---|---|---|---|
    | `"tq2_0"` | -1, 0, 1 | 256 | 2.06 |
    | `"tq1_0"` | -1, 0, 1 | 256 | 1.69 |
    | `"q2_0"` | -1, 0, 1, 2 | 64 | 2.25 |
    | `"i2_s"` | -1, 0, 1 | 128 | 2, bitnet.cpp on x86 only |
    | `"q1_0"` | -1, 1 | 128 | 1.125 |
    | `"q4_0"` | -8 .. 7 | 32 | 4.5 |
    | `"q8_0"` | -128 .. 127 | 32 | 8.5 |
    | `"f16"`, `"f32"` | any | 1 | 16, 32 |

    llama.cpp quantizes activations to 8 bits in blocks of 32 or 256, not per token: its logits
    are close to the ones here, not equal.

    Args:
        model: `BitNetCausalLM`, packed or not.
        path: Path of the file.
        type: Type of the projections, see the table.
        arch: `"llama"`, `"bitnet"` (llama.cpp: SiLU gates and tied embeddings only),
            `"bitnet-b1.58"` (bitnet.cpp and ik_llama.cpp), or `"auto"`: by sub-norms and type.
        embedding_type: `"f16"`, `"f32"` or `"q8_0"`: of the embedding and output projection.
        tokenizer: `keras_bitnet.interop.Tokenizer` to write along, `model.tokenizer` by default;
            without one the reader gives and takes token ids.
        name: Name of the model in the file, that of `model` by default.

    Raises:
        ValueError: The type cannot hold the codes, or the architecture not the model.
        ImportError: The package gguf is not installed (`keras-bitnet[gguf]`).

    Warns:
        UserWarning: A reader is known to compute something else.
    """
    gguf = require("gguf", "gguf")
    check_choice("type", type, TYPES)
    check_choice("arch", arch, ("auto", *ARCHITECTURES))
    check_choice("embedding_type", embedding_type, TABLE_TYPES)
    backbone = check_model(model)
    check_architecture(backbone)
    arch = _architecture(backbone, arch, type)
    metadata = _metadata(backbone, arch, name or model.name)
    tokenizer = tokenizer or own_tokenizer(model)
    if tokenizer is None:
        metadata["tokenizer.ggml.model"] = "no_vocab"
    else:
        metadata.update(tokenizer_metadata(tokenizer, backbone.vocabulary_size))
    tensors = _tensors(backbone, arch, type, embedding_type)
    file_type = i2_s.FILE_TYPE if type == i2_s.NAME else None
    if file_type is None:
        file_type = FLOAT_TYPES[type][1] if type in FLOAT_TYPES else BLOCK_TYPES[type].file_type
    metadata["general.file_type"] = file_type
    with replacing(path) as temporary:
        _write(gguf, temporary, arch, metadata, tensors)


def _architecture(backbone, arch, type):
    if arch == "auto":
        arch = LLAMA if backbone.sub_norm is None else BITNET
        if type == i2_s.NAME and backbone.sub_norm is not None:
            arch = BITNET_CPP
    if (backbone.sub_norm is None) != (arch == LLAMA):
        raise ValueError(
            "A model with sub-norms has an architecture of BitNet, one without is 'llama'. "
            f"Received: arch={arch!r}, sub_norm={backbone.sub_norm!r}"
        )
    if backbone.projection_norm is not None:
        raise ValueError(
            "GGUF files hold no norm in every projection. Received: "
            f"projection_norm={backbone.projection_norm!r}"
        )
    activation = activation_name(backbone)
    if activation == "relu2" and arch == LLAMA:
        raise ValueError("GGUF's 'llama' computes SiLU gates. Received: activation='relu2'")
    if arch == LLAMA:
        return arch
    if backbone.hidden_dim != backbone.num_query_heads * backbone.head_dim:
        raise ValueError(
            "GGUF's BitNet needs heads that fill the stream. Received: "
            f"hidden_dim={backbone.hidden_dim}, num_query_heads={backbone.num_query_heads}, "
            f"head_dim={backbone.head_dim}"
        )
    if arch == BITNET and not backbone.tie_word_embeddings:
        raise ValueError(
            "llama.cpp loads 'bitnet' with tied embeddings only. Received: "
            "tie_word_embeddings=False. bitnet.cpp reads arch='bitnet-b1.58'."
        )
    if arch == BITNET and activation == "relu2":
        warnings.warn(
            "llama.cpp computes SiLU gates for 'bitnet', whatever the file says: its answers from "
            "this model (relu2 gates) will be wrong. bitnet.cpp and ik_llama.cpp read "
            "arch='bitnet-b1.58'.",
            stacklevel=3,
        )
    return arch


def _metadata(backbone, arch, name):
    values = {
        "context_length": backbone.max_sequence_length,
        "embedding_length": backbone.hidden_dim,
        "block_count": backbone.num_layers,
        "feed_forward_length": backbone.intermediate_dim,
        "attention.head_count": backbone.num_query_heads,
        "attention.head_count_kv": backbone.num_key_value_heads,
        "attention.key_length": backbone.head_dim,
        "attention.value_length": backbone.head_dim,
        "attention.layer_norm_rms_epsilon": float(backbone.norm_epsilon),
        "rope.dimension_count": backbone.head_dim,
        "rope.freq_base": float(backbone.rope_max_wavelength),
        "vocab_size": backbone.vocabulary_size,
        "hidden_activation": activation_name(backbone),
    }
    if backbone.rope_scaling_factor != 1:
        values["rope.scaling.type"] = "linear"
        values["rope.scaling.factor"] = float(backbone.rope_scaling_factor)
    metadata = {f"{arch}.{key}": value for key, value in values.items()}
    return {"general.name": name, "general.quantization_version": 2, **metadata}


def _tensors(backbone, arch, type, embedding_type):
    """Every tensor of the file, with all checks done and nothing made yet."""
    tensors = []
    for place in tensor_map.tables(backbone):
        tensors += _matrix(place, embedding_type, place.gguf, 0, arch)
    for place in tensor_map.norms(backbone):
        shape = tuple(place.layer.scale.shape)
        make = lambda layer=place.layer: weights.get_norm(layer)  # noqa: E731
        tensors.append(Tensor(f"{place.gguf}.weight", shape, 0, 4 * shape[0], make))
    for place in tensor_map.projections(backbone):
        weights.check_exportable(place.layer, place.gguf)
        heads = place.heads if arch == LLAMA else 0
        tensors += _matrix(place, type, place.gguf, heads, arch)
    return tensors


def _matrix(place, type, name, heads, arch):
    """The tensor of one matrix, and that of its scale."""
    layer = place.layer
    shape = tensor_map.matrix_shape(layer)
    size = shape[0] * shape[1]
    weight = f"{name}.weight"
    if type in FLOAT_TYPES:
        type_id, _, dtype = FLOAT_TYPES[type]
        make = lambda: _as_float(permute_heads(weights.get_matrix(layer), heads), dtype, weight)  # noqa: E731
        return [Tensor(weight, shape, type_id, size * dtype.itemsize, make)]
    check_rows(shape[1], type, weight)
    if not _is_quantized(layer):
        if type != "q8_0":
            raise ValueError(
                f"'{weight}' is float and cannot be written as '{type}'. Received: a model of "
                "quantization_strength 0; take type='f16' or 'q8_0', or train it quantized."
            )
        block = BLOCK_TYPES[type]
        make = lambda: _q8_0(permute_heads(weights.get_matrix(layer), heads))  # noqa: E731
        return [Tensor(weight, shape, block.id, size // block.block_size * block.block_bytes, make)]
    return _quantized_matrix(layer, type, weight, shape, heads, arch)


def _quantized_matrix(layer, type, weight, shape, heads, arch):
    size = shape[0] * shape[1]
    block = BLOCK_TYPES["tq2_0"] if type == i2_s.NAME else BLOCK_TYPES[type]
    scales = layer.weight_quantizer.scale_shape(shape[1], shape[0])  # (groups, out)
    whole = scales == (1, 1)

    def make_codes():
        found = fit_codes(weights.get_codes(layer), type, block, weight)
        return permute_heads(found.codes, heads), permute_heads(found.scale, heads)

    if type == i2_s.NAME:
        if not whole:
            raise ValueError(f"'{i2_s.NAME}' has one scale for a tensor. Received: {scales}")
        make_i2_s = lambda: i2_s.encode(*make_codes())  # noqa: E731
        return [Tensor(weight, shape, i2_s.ID, i2_s.nbytes(size), make_i2_s)]
    block_scales(np.ones(scales[::-1], np.float32), shape[1], block, weight)
    apart = whole and arch != BITNET_CPP  # whose readers know no tensor of the scale

    def make():
        codes, scale = make_codes()
        # The step of the type times 1: blocks of scale d = 1.
        scale = np.full((1, 1), block.step, np.float32) if apart else scale
        return block.encode(codes, block_scales(scale, shape[1], block, weight))

    nbytes = size // block.block_size * block.block_bytes
    tensors = [Tensor(weight, shape, block.id, nbytes, make)]
    if apart:
        make_scale = lambda: make_codes()[1].reshape(1) / np.float32(block.step)  # noqa: E731
        tensors.append(Tensor(weight.replace(".weight", ".scale"), (1,), 0, 4, make_scale))
    return tensors


def _is_quantized(layer):
    if not isinstance(layer, BitLayer):
        return False
    if layer.packed:
        return True
    strength = float(layer.quantization_strength)
    if 0 < strength < 1:
        raise ValueError(
            f"Layer '{layer.name}' is half quantized (quantization_strength={strength:.3g}): "
            "finish its training, or set the strength to 0 or 1."
        )
    return strength == 1


def _as_float(matrix, dtype, name):
    with np.errstate(over="ignore"):
        values = matrix.astype(dtype)
    if not np.isfinite(values).all():
        raise ValueError(f"'{name}' has weights that are not finite as {dtype.name}.")
    return values


def _q8_0(matrix):
    gguf = require("gguf", "gguf")
    return gguf.quants.quantize(matrix, gguf.GGMLQuantizationType.Q8_0)


def _write(gguf, path, arch, metadata, tensors):
    writer = gguf.GGUFWriter(path, arch)
    for key, value in metadata.items():
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        else:
            writer.add_array(key, value)
    for tensor in tensors:
        # A dtype that is not uint8, since the shape is that of the weights, not of the bytes.
        writer.add_tensor_info(
            tensor.name, tensor.shape, np.dtype(np.int8), tensor.nbytes, raw_dtype=tensor.type_id
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for tensor in tensors:
        data = np.ascontiguousarray(tensor.make())
        if data.nbytes != tensor.nbytes:
            raise RuntimeError(f"'{tensor.name}' has {data.nbytes} bytes, not {tensor.nbytes}.")
        writer.write_tensor_data(data)
    writer.close()
