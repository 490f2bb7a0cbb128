"""Decoders of KerasHub as `BitNetCausalLM`."""

import operator

from keras import ops

from keras_bitnet.interop.files import require
from keras_bitnet.interop.tensor_map import projections
from keras_bitnet.interop.weights import set_matrix, set_norm
from keras_bitnet.models import BitNetBackbone, BitNetCausalLM

# attribute of a KerasHub decoder layer, in the order of `tensor_map.PROJECTIONS`
_PROJECTIONS = (
    "_self_attention_layer._query_dense", "_self_attention_layer._key_dense",
    "_self_attention_layer._value_dense", "_self_attention_layer._output_dense",
    "_feedforward_gate_dense", "_feedforward_intermediate_dense", "_feedforward_output_dense",
)  # fmt: skip


def from_keras_hub(model, **arguments):
    """Copies a Llama decoder of KerasHub.

    Its logits are those of the KerasHub model on sequences without padding or with padding on
    the right.

    Args:
        model: `keras_hub.models.LlamaCausalLM` or `LlamaBackbone`, or the Llama 3 ones; it is
            left as it is.
        **arguments: Arguments of `BitNetBackbone` in place of those of the model, such as
            `weight_quantizer="int4"`, `embedding_quantizer="int8"` or `packed=True`.

    Returns:
        `BitNetCausalLM` of float weights with `quantization_strength=0`: ready for
        `keras_bitnet.models.convert_to_bitnet`, or for `keras_bitnet.pack_model`. It has no
        tokenizer: the one of KerasHub may be set as `tokenizer` if it has `encode` and `decode`.

    Raises:
        ValueError: The model is of another kind, or its rotary embedding has frequency factors.
        ImportError: The package keras-hub is not installed (`keras-bitnet[hub]`).
    """
    hub = require("keras_hub", "hub").models
    source = getattr(model, "backbone", model)
    if not isinstance(source, hub.LlamaBackbone):
        raise ValueError(
            "Expected a `LlamaCausalLM` or `LlamaBackbone` of KerasHub. "
            f"Received: {type(model).__name__}"
        )
    if source.rope_frequency_adjustment_factor is not None:
        raise ValueError(
            "A rotary embedding with frequency factors cannot be copied. Received: "
            f"rope_frequency_adjustment_factor={source.rope_frequency_adjustment_factor}"
        )
    given = {
        "vocabulary_size": source.vocabulary_size,
        "num_layers": source.num_layers,
        "num_query_heads": source.num_query_heads,
        "num_key_value_heads": source.num_key_value_heads,
        "hidden_dim": source.hidden_dim,
        "intermediate_dim": source.intermediate_dim,
        "activation": "silu",
        "sub_norm": None,
        "norm_epsilon": source.layer_norm_epsilon,
        "rope_max_wavelength": source.rope_max_wavelength,
        "rope_scaling_factor": source.rope_position_scaling_factor,
        "tie_word_embeddings": source.token_embedding.tie_weights,
        "dropout": source.dropout,
        "quantization_strength": 0.0,
        "dtype": source.dtype_policy,
    }
    backbone = BitNetBackbone(**{**given, **arguments})
    _copy(source, backbone)
    return BitNetCausalLM(backbone)


def _copy(source, backbone):
    embedding = source.token_embedding
    set_matrix(backbone.token_embedding, _array(embedding.embeddings))
    if backbone.output_projection is not None:
        set_matrix(backbone.output_projection, _array(embedding.reverse_embeddings).T)
    set_norm(backbone.layer_norm, _array(source.layer_norm.scale))
    places = iter(projections(backbone))
    for old, new in zip(source.transformer_layers, backbone.decoder_layers, strict=True):
        set_norm(new.attention_norm, _array(old._self_attention_layernorm.scale))
        set_norm(new.feed_forward_norm, _array(old._feedforward_layernorm.scale))
        for path in _PROJECTIONS:
            dense, layer = operator.attrgetter(path)(old), next(places).layer
            if layer.packed:
                kernel = layer.kernel_to_matrix(ops.convert_to_tensor(dense.kernel))
                set_matrix(layer, _array(kernel).T)
            else:
                layer.take_weights(dense)


def _array(weight):
    return ops.convert_to_numpy(ops.cast(weight, "float32"))
