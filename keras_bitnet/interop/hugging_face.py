"""Models from and to Hugging Face checkpoints."""

import json
import pathlib

import ml_dtypes
import numpy as np

from keras_bitnet.checks import check_choice
from keras_bitnet.interop import tensor_map, weights
from keras_bitnet.interop import tokenizer as tokenizer_files
from keras_bitnet.interop.codecs import hugging_face as codec
from keras_bitnet.interop.files import folder_written_whole, read_json
from keras_bitnet.interop.hf_config import (
    VARIANTS,
    check_architecture,
    read_arguments,
    read_variant,
    write_config,
)
from keras_bitnet.interop.safetensors_file import SHARD_BYTES, WEIGHTS, Checkpoint, write_checkpoint
from keras_bitnet.kernels import use_huge_pages
from keras_bitnet.models import BitNetBackbone, BitNetCausalLM
from keras_bitnet.quantizers import ActivationInt8, Ternary

FLOATS = ("F32", "F16", "BF16")
DTYPES = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16}


def from_hugging_face(path, *, packed=None, dtype=None, **arguments):
    """Reads a checkpoint folder of `BitNetForCausalLM` or `LlamaForCausalLM`.

    The weights come in tensor by tensor from memory-mapped files: at most the model and one
    float matrix are in memory. Packed ternary weights stay codes and never pass through float.

    | `quantization_config` | here |
    |---|---|
    | none | float (`quantization_strength=0`), ready for quantization-aware training |
    | `autobitlinear`, online | float masters, quantized as they are used |
    | `autobitlinear`, offline | packed, `scale = weight_scale` |
    | `bitlinear` | packed, `scale = 1 / weight_scale` |

    Args:
        path: Folder with `config.json` and `model.safetensors`, in one file or many, such as
            `huggingface_hub.snapshot_download` makes.
        packed: Whether a checkpoint of float weights is packed as it is read, by the
            `weight_quantizer`. Packed checkpoints are packed models.
        dtype: Dtype policy of the model, Keras's by default.
        **arguments: Arguments of `BitNetBackbone` in place of those of the checkpoint, such as
            `weight_quantizer="int4"`, `quantization_strength=1.0` or `embedding_quantizer="int8"`.

    Returns:
        `BitNetCausalLM`, with its `tokenizer` if the folder has a `tokenizer.json`.

    Raises:
        FileNotFoundError: The folder or a file in it is missing.
        ValueError: A file is corrupt, or the model is of another kind.
        ImportError: The package safetensors is not installed (`keras-bitnet[hf]`).
    """
    path = pathlib.Path(path)
    if not path.is_dir():
        raise FileNotFoundError(
            f"There is no folder '{path}'. Of a checkpoint on the Hub, "
            f"`huggingface_hub.snapshot_download({str(path)!r})` makes one and gives its path."
        )
    config = read_json(path / "config.json")
    variant = read_variant(config)
    if variant.packed and packed is False:
        raise ValueError(
            f"A checkpoint of the variant '{variant.name}' is packed; read it so and unpack it "
            "with `keras_bitnet.unpack_model`. Received: packed=False"
        )
    packed = variant.packed or bool(packed)
    given = {
        "quantization_strength": 0.0 if variant.name == "float" and not packed else 1.0,
        "packed": packed,
        "dtype": dtype,
        **read_arguments(config),
        **arguments,
    }
    with Checkpoint(path) as checkpoint:
        if "tie_word_embeddings" not in config:
            given["tie_word_embeddings"] = "lm_head.weight" not in checkpoint
        _check_sizes(checkpoint, given)
        backbone = BitNetBackbone(**given)
        if variant.packed and backbone.weight_quantizer != Ternary():
            raise ValueError(
                "The weights of this checkpoint are ternary with a scale per tensor. Received: "
                f"weight_quantizer={backbone.weight_quantizer}"
            )
        for place in tensor_map.projections(backbone):
            _read_projection(checkpoint, place, variant)
            if backbone.projection_norm is not None:
                _read_norm(checkpoint, place.layer.normalization, f"{place.hugging_face}.rms_norm")
        for place in tensor_map.norms(backbone):
            _read_norm(checkpoint, place.layer, place.hugging_face)
        for place in tensor_map.tables(backbone):
            shape = tensor_map.matrix_shape(place.layer)
            matrix = checkpoint.rows(f"{place.hugging_face}.weight", shape, FLOATS)
            weights.set_matrix(place.layer, matrix)
    model = BitNetCausalLM(backbone)
    if (path / tokenizer_files.MODEL).is_file():
        model.tokenizer = tokenizer_files.Tokenizer.from_folder(path)
    use_huge_pages(model)
    return model


def _check_sizes(checkpoint, arguments):
    """Compares the sizes of `config.json` with the file before anything of them is made."""
    table = (arguments["vocabulary_size"], arguments["hidden_dim"])
    found = checkpoint.shape("model.embed_tokens.weight")
    if found != table:
        raise ValueError(
            f"`config.json` describes an embedding of shape {table}. Received: {found} in the file"
        )
    last = f"model.layers.{arguments['num_layers'] - 1}."
    if f"{last}mlp.down_proj.weight" not in checkpoint:
        raise ValueError(f"The checkpoint has no tensors '{last}...' that `config.json` describes.")
    _, size = checkpoint.shape(f"{last}mlp.down_proj.weight")
    rows = checkpoint.shape(f"{last}self_attn.o_proj.weight")[1]
    heads = arguments["num_query_heads"] * arguments["head_dim"]
    if (size, rows) != (arguments["intermediate_dim"], heads):
        raise ValueError(
            f"`config.json` describes blocks of {arguments['intermediate_dim']} inside and {heads} "
            f"in all heads. Received: {size} and {rows} in the file"
        )


def _read_projection(checkpoint, place, variant):
    out_features, in_features = tensor_map.matrix_shape(place.layer)
    name = f"{place.hugging_face}.weight"
    if not variant.packed:
        matrix = checkpoint.read(name, (out_features, in_features), FLOATS)
        weights.set_matrix(place.layer, matrix)
        return
    if out_features % codec.ROWS:
        raise ValueError(f"'{name}' has {out_features} outputs, no multiple of {codec.ROWS}.")
    packed = checkpoint.read(name, (out_features // codec.ROWS, in_features), ("U8",))
    scale = checkpoint.read(f"{place.hugging_face}.weight_scale", (1,), FLOATS)
    scale = scale.astype(np.float32).reshape(1, 1)
    if not np.isfinite(scale).all() or (variant.inverse and not scale.all()):
        raise ValueError(f"'{place.hugging_face}.weight_scale' is {scale.item()}.")
    if variant.inverse:
        scale = np.float32(1) / scale
    weights.set_codes(place.layer, codec.unpack_rows(packed), scale)


def _read_norm(checkpoint, layer, name):
    scale = checkpoint.read(f"{name}.weight", tuple(layer.scale.shape), FLOATS)
    weights.set_norm(layer, scale)


def to_hugging_face(
    model, path, *, variant="offline", dtype=None, tokenizer=None, shard_bytes=SHARD_BYTES
):
    """Writes a checkpoint folder that `transformers` loads with `from_pretrained`.

    A model with sub-norms becomes a `BitNetForCausalLM`, one without a `LlamaForCausalLM`. In
    float32 its logits there are those here.

    Args:
        model: `BitNetCausalLM`, packed or not, with ternary weights of one scale per tensor and
            int8 activations per token (for `variant="float"` any).
        path: Folder, made if need be. Weights that it holds already are replaced.
        variant: `"offline"`: packed codes and their scale. `"bitlinear"`: packed codes and the
            inverse of the scale, as older programs read them. `"online"`: float masters that
            are quantized when they are used. `"float"`: the weights as float; the activations
            are not quantized there.
        dtype: `"float32"` or `"bfloat16"`: of the floats in the files, the dtype of the model's
            variables by default.
        tokenizer: `keras_bitnet.interop.Tokenizer` whose files are written too,
            `model.tokenizer` by default.
        shard_bytes: Largest size of a file.

    Raises:
        ValueError: The variant cannot hold this model.
        ImportError: The package safetensors is not installed (`keras-bitnet[hf]`).
    """
    check_choice("variant", variant, tuple(VARIANTS))
    backbone = check_model(model)
    check_architecture(backbone)
    dtype = dtype or backbone.variable_dtype
    check_choice("dtype", dtype, tuple(DTYPES))
    kind = VARIANTS[variant]
    _check_quantizers(backbone, kind)
    tokenizer = tokenizer or own_tokenizer(model)
    config = write_config(backbone, kind, dtype, tokenizer)
    with folder_written_whole(path, replaced=WEIGHTS) as folder:
        write_checkpoint(folder, _tensors(backbone, kind, DTYPES[dtype]), shard_bytes)
        files = {"config.json": config, **(tokenizer.files() if tokenizer else {})}
        if tokenizer is not None:
            files["generation_config.json"] = {
                "bos_token_id": tokenizer.bos_token_id,
                "eos_token_id": list(tokenizer.eos_token_ids),
                "pad_token_id": tokenizer.pad_token_id,
            }
        for name, content in files.items():
            text = content if isinstance(content, str) else json.dumps(content, indent=2) + "\n"
            (folder / name).write_text(text, encoding="utf-8")


def check_model(model):
    """The backbone of a `BitNetCausalLM`; a `ValueError` for anything else."""
    if not isinstance(model, BitNetCausalLM):
        raise ValueError(f"Expected a `BitNetCausalLM`. Received: {type(model).__name__}")
    return model.backbone


def own_tokenizer(model):
    """`model.tokenizer` where it can be written, or `None`."""
    tokenizer = getattr(model, "tokenizer", None)
    return tokenizer if isinstance(tokenizer, tokenizer_files.Tokenizer) else None


def _check_quantizers(backbone, kind):
    if kind.name == "float":
        if backbone.projection_norm is not None:
            raise ValueError(
                "The variant 'float' has no norms in every projection. Received: "
                f"projection_norm={backbone.projection_norm!r}"
            )
        return
    weight, activation = backbone.weight_quantizer, backbone.activation_quantizer
    ternary = type(weight) is Ternary and weight.granularity == "tensor"
    if kind.name == "online" and weight.scale != "absmean":
        ternary = False
    if not ternary or activation != ActivationInt8():
        raise ValueError(
            f"The variant '{kind.name}' holds ternary weights with a scale per tensor"
            f"{' that is their mean magnitude' if kind.name == 'online' else ''} and int8 "
            f"activations per token. Received: {weight} and {activation}. Write it with "
            "`variant='float'`, or to GGUF."
        )


def _tensors(backbone, kind, dtype):
    """Every `(name, array)` of the checkpoint, one at a time."""
    for place in tensor_map.tables(backbone):
        yield f"{place.hugging_face}.weight", weights.get_matrix(place.layer).astype(dtype)
    for place in tensor_map.norms(backbone):
        yield f"{place.hugging_face}.weight", weights.get_norm(place.layer).astype(dtype)
    for place in tensor_map.projections(backbone):
        name, layer = place.hugging_face, place.layer
        weights.check_exportable(layer, name)
        if backbone.projection_norm is not None:
            yield f"{name}.rms_norm.weight", weights.get_norm(layer.normalization).astype(dtype)
        if kind.packed:
            codes, scale, _ = weights.get_codes(layer)
            scale = np.float32(1) / scale if kind.inverse else scale
            yield f"{name}.weight", codec.pack_rows(codes)
            yield f"{name}.weight_scale", scale.reshape(1).astype(np.float32)
        elif kind.name == "online":
            yield f"{name}.weight", weights.get_master(layer).astype(dtype)
        else:
            yield f"{name}.weight", weights.get_matrix(layer).astype(dtype)
