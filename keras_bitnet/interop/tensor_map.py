"""Where the weights of a `BitNetBackbone` are, and their names in outside files."""

import dataclasses
import operator
from typing import Any

import keras

# attribute of a decoder layer, name in Hugging Face's files, name in GGUF files
PROJECTIONS = (
    ("attention.query_dense", "self_attn.q_proj", "attn_q"),
    ("attention.key_dense", "self_attn.k_proj", "attn_k"),
    ("attention.value_dense", "self_attn.v_proj", "attn_v"),
    ("attention.output_dense", "self_attn.o_proj", "attn_output"),
    ("feed_forward.gate_dense", "mlp.gate_proj", "ffn_gate"),
    ("feed_forward.up_dense", "mlp.up_proj", "ffn_up"),
    ("feed_forward.down_dense", "mlp.down_proj", "ffn_down"),
)
NORMS = (
    ("attention_norm", "input_layernorm", "attn_norm"),
    ("feed_forward_norm", "post_attention_layernorm", "ffn_norm"),
)
SUB_NORMS = (
    ("attention.output_dense.normalization", "self_attn.attn_sub_norm", "attn_sub_norm"),
    ("feed_forward.down_dense.normalization", "mlp.ffn_sub_norm", "ffn_sub_norm"),
)


@dataclasses.dataclass(frozen=True)
class Place:
    """A layer that holds one matrix or one norm.

    Attributes:
        layer: The Keras layer.
        hugging_face: Name of its tensor in a checkpoint, `.weight` left out.
        gguf: Name of its tensor in a GGUF file, `.weight` left out.
        heads: For queries and keys the number of heads, which GGUF's `"llama"` orders
            otherwise; else 0.
    """

    layer: Any
    hugging_face: str
    gguf: str
    heads: int = 0


def projections(backbone):
    """The quantized projections of all blocks, as a list of `Place`."""
    heads = {"attn_q": backbone.num_query_heads, "attn_k": backbone.num_key_value_heads}
    return [
        Place(layer, hugging_face, gguf, heads.get(gguf.rpartition(".")[2], 0))
        for layer, hugging_face, gguf in _in_blocks(backbone, PROJECTIONS)
    ]


def norms(backbone):
    """The norms of all blocks and the last one, as a list of `Place`."""
    rows = NORMS + (SUB_NORMS if backbone.sub_norm else ())
    places = [Place(*found) for found in _in_blocks(backbone, rows)]
    return [*places, Place(backbone.layer_norm, "model.norm", "output_norm")]


def tables(backbone):
    """The token embedding and, where it is not tied, the output projection."""
    places = [Place(backbone.token_embedding, "model.embed_tokens", "token_embd")]
    if backbone.output_projection is not None:
        places.append(Place(backbone.output_projection, "lm_head", "output"))
    return places


def matrix_shape(layer):
    """Shape `(out, in)` of the matrix of a layer, as outside files have it."""
    if hasattr(layer, "in_features"):
        return layer.out_features, layer.in_features
    if isinstance(layer, keras.layers.Embedding):
        return layer.input_dim, layer.output_dim
    return tuple(layer.kernel.shape)[::-1]


def _in_blocks(backbone, rows):
    for i, block in enumerate(backbone.decoder_layers):
        for attribute, hugging_face, gguf in rows:
            layer = operator.attrgetter(attribute)(block)
            yield layer, f"model.layers.{i}.{hugging_face}", f"blk.{i}.{gguf}"
