"""Models from GGUF files."""

import warnings

import numpy as np

from keras_bitnet import quantizers
from keras_bitnet.interop import tensor_map, weights
from keras_bitnet.interop.codecs import BLOCK_TYPES, i2_s
from keras_bitnet.interop.gguf_file import GGUFFile
from keras_bitnet.interop.gguf_layout import restore_heads
from keras_bitnet.interop.gguf_tokenizer import read_tokenizer
from keras_bitnet.interop.to_gguf import ARCHITECTURES, BITNET, LLAMA
from keras_bitnet.kernels import use_huge_pages
from keras_bitnet.models import BitNetBackbone, BitNetCausalLM

# A file of these types is read as a packed model of this quantizer.
_QUANTIZERS = {
    "tq2_0": quantizers.Ternary, "tq1_0": quantizers.Ternary, "q2_0": quantizers.Ternary,
    "i2_s": quantizers.Ternary, "q1_0": quantizers.Binary, "q4_0": quantizers.Int4,
    "q8_0": quantizers.Int8,
}  # fmt: skip
_NAMES = {i2_s.ID: i2_s.NAME, **{block.id: block.name for block in BLOCK_TYPES.values()}}


def from_gguf(path, *, packed=None, dtype=None, **arguments):
    """Reads a GGUF file of the architectures `"llama"`, `"bitnet"` and `"bitnet-b1.58"`.

    The file is memory-mapped and read tensor by tensor. If all projections are of one type whose
    codes a packed layer can hold (`tq2_0`, `tq1_0`, `i2_s`, `q2_0`, `q1_0`, `q4_0`, `q8_0`), the
    model is packed with just these codes; they never pass through float. Other types (`q4_1`,
    `q4_K`, `q6_K`, `f16`, ...) are read as float.

    Args:
        path: Path of the file.
        packed: `None`: packed if the file is, as above. `True`: a file of other types is packed
            by the `weight_quantizer` as it is read. `False`: float weights, dequantized.
        dtype: Dtype policy of the model, Keras's by default.
        **arguments: Arguments of `BitNetBackbone` in place of those of the file, such as
            `weight_quantizer=Int4(group_size=64)` or `embedding_quantizer="int8"`.

    Returns:
        `BitNetCausalLM`, with its `tokenizer` if the file has one. Float weights have
        `quantization_strength=0`: they are ready for quantization-aware training, or for
        `keras_bitnet.pack_model`.

    Warns:
        UserWarning: The file has a tokenizer of a kind that cannot be read.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is corrupt, or the model or a type is of another kind.
        ImportError: The package gguf is not installed (`keras-bitnet[gguf]`).
    """
    with GGUFFile(path) as file:
        arch = file.metadata.get("general.architecture")
        given = read_arguments(file, arch)
        own = None
        if packed is not False and "weight_quantizer" not in arguments:
            own = _own_quantizer(file, given["num_layers"])
        if own is not None:
            given["weight_quantizer"] = own
        is_packed = own is not None or bool(packed)
        given.update(packed=is_packed, quantization_strength=float(is_packed), dtype=dtype)
        backbone = BitNetBackbone(**{**given, **arguments})
        for place in tensor_map.projections(backbone):
            _read_projection(file, place, place.heads if arch == LLAMA else 0, own)
        for place in tensor_map.norms(backbone):
            shape = tuple(place.layer.scale.shape)
            weights.set_norm(place.layer, file.floats(f"{place.gguf}.weight", shape))
        for place in tensor_map.tables(backbone):
            shape = tensor_map.matrix_shape(place.layer)
            weights.set_matrix(place.layer, file.floats(f"{place.gguf}.weight", shape))
        model = BitNetCausalLM(backbone)
        if file.metadata.get("tokenizer.ggml.model", "no_vocab") != "no_vocab":
            try:
                model.tokenizer = read_tokenizer(file.metadata)
            except ValueError as error:
                warnings.warn(f"The model is read without a tokenizer. {error}", stacklevel=2)
    use_huge_pages(model)
    return model


def read_arguments(file, arch):
    """The arguments of `BitNetBackbone` that the metadata describes.

    Raises:
        ValueError: The architecture is another, a value is missing, or sizes contradict the
            tensors.
    """
    if arch not in ARCHITECTURES:
        raise ValueError(f"The architecture must be one of {ARCHITECTURES}. Received: {arch!r}")

    def value(key, default=None, kind=int):
        found = file.metadata.get(f"{arch}.{key}", default)
        if not isinstance(found, kind) or isinstance(found, bool) or not found:
            raise ValueError(f"The file has no usable `{arch}.{key}`. Received: {found!r}")
        return found

    heads, hidden_dim = value("attention.head_count"), value("embedding_length")
    if value("rope.scaling.type", "none", str) not in ("none", "linear"):
        raise ValueError(
            f"The rotary embedding must be of type 'none' or 'linear'. Received: "
            f"{file.metadata[f'{arch}.rope.scaling.type']!r}"
        )
    if "rope_freqs.weight" in file or value("expert_count", 1) != 1:
        raise ValueError(
            "Models with frequency factors or experts cannot be read. Received: "
            f"{arch}.expert_count={file.metadata.get(f'{arch}.expert_count')}, "
            f"{'a' if 'rope_freqs.weight' in file else 'no'} tensor 'rope_freqs.weight'"
        )
    biases = [name for name in file.tensors if name.endswith(".bias")]
    if biases:
        raise ValueError(f"Projections with biases cannot be read. Received: {biases[:4]}")
    arguments = {
        "vocabulary_size": file.info("token_embd.weight").shape[0],
        "num_layers": value("block_count"),
        "num_query_heads": heads,
        "num_key_value_heads": value("attention.head_count_kv", heads),
        "hidden_dim": hidden_dim,
        "intermediate_dim": value("feed_forward_length"),
        "head_dim": value("attention.key_length", hidden_dim // heads),
        "activation": _activation(file, arch),
        "sub_norm": None if arch == LLAMA else "rms",
        "norm_epsilon": value("attention.layer_norm_rms_epsilon", kind=float),
        "rope_max_wavelength": value("rope.freq_base", 10000.0, float),
        "rope_scaling_factor": value("rope.scaling.factor", 1.0, float),
        "tie_word_embeddings": "output.weight" not in file,
        "max_sequence_length": value("context_length"),
    }
    rotated = value("rope.dimension_count", arguments["head_dim"])
    if rotated != arguments["head_dim"]:
        raise ValueError(
            f"The rotary embedding must turn whole heads of {arguments['head_dim']}. Received: "
            f"{arch}.rope.dimension_count={rotated}"
        )
    _check_sizes(file, arguments)
    return arguments


def _activation(file, arch):
    default = "silu" if arch in (LLAMA, BITNET) else "relu2"
    activation = file.metadata.get(f"{arch}.hidden_activation", default)
    if activation not in ("silu", "relu2"):
        raise ValueError(f"The gates must be 'silu' or 'relu2'. Received: {activation!r}")
    return activation


def _check_sizes(file, arguments):
    """Compares the metadata with the tensors before anything of these sizes is made."""
    last = f"blk.{arguments['num_layers'] - 1}"
    inner = arguments["num_query_heads"] * arguments["head_dim"]
    keys = arguments["num_key_value_heads"] * arguments["head_dim"]
    hidden_dim = arguments["hidden_dim"]
    file.info("token_embd.weight", (arguments["vocabulary_size"], hidden_dim))
    file.info(f"{last}.attn_output.weight", (hidden_dim, inner))
    file.info(f"{last}.attn_k.weight", (keys, hidden_dim))
    file.info(f"{last}.ffn_down.weight", (hidden_dim, arguments["intermediate_dim"]))


def _projection_names(num_layers):
    return [f"blk.{i}.{gguf}" for i in range(num_layers) for _, _, gguf in tensor_map.PROJECTIONS]


def _own_quantizer(file, num_layers):
    """The quantizer whose codes are those of the file, or `None`: it is to be read as float."""
    names = _projection_names(num_layers)
    kinds = {_NAMES.get(file.info(f"{name}.weight").type_id, "") for name in names}
    kind = kinds.pop()
    if kinds or not kind:
        return None
    quantizer = _QUANTIZERS[kind]
    if kind == i2_s.NAME:
        return quantizer()
    block = BLOCK_TYPES[kind]
    granularity = "tensor"
    for name in names:
        codes, scale, _ = file.codes(f"{name}.weight", None)
        if quantizer is quantizers.Ternary and codes.max() > 2:
            return None  # Q2_0 has a fourth level
        if (scale == scale[0, 0]).all():
            continue
        granularity = "channel" if granularity == "tensor" else granularity
        if (scale != scale[:, :1]).any():
            return quantizer(group_size=block.block_size)
    return quantizer(granularity=granularity)


def _read_projection(file, place, heads, own):
    shape = tensor_map.matrix_shape(place.layer)
    name = f"{place.gguf}.weight"
    factor = np.float32(1)
    if f"{place.gguf}.scale" in file:
        factor = file.floats(f"{place.gguf}.scale", (1,))[0]
    if own is None:
        matrix = file.floats(name, shape) * factor
        weights.set_matrix(place.layer, restore_heads(matrix, heads))
        return
    codes, scale, _ = file.codes(name, shape)
    if own.granularity == "tensor":
        scale = scale[:1, :1]
    elif own.granularity == "channel":
        scale = scale[:, :1]
    scale = restore_heads(scale, heads) * factor
    weights.set_codes(place.layer, restore_heads(codes, heads), scale)
