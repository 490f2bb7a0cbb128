"""A packed block of a decoder for one new token: where it can be, one operator."""

from keras import activations, ops

from keras_bitnet.kernels import decoder_block
from keras_bitnet.kernels.cpu import Facts
from keras_bitnet.layers.bit_einsum_dense import BitEinsumDense
from keras_bitnet.layers.bit_feed_forward import BitFeedForward, relu_squared
from keras_bitnet.layers.bit_grouped_query_attention import BitGroupedQueryAttention
from keras_bitnet.layers.bit_linear import BitLinear
from keras_bitnet.layers.rms_normalization import RMSNormalization
from keras_bitnet.layers.rotary import in_float32

# As `kbn_activation` of `kernels/native/src/bitnet.h` numbers them.
ACTIVATIONS = {activations.relu: 0, relu_squared: 1, activations.silu: 2}


def decode_at_once(block, x, attention_mask, positions, rotary, cache, cache_index):
    """What a block of a decoder makes of one new token of each sequence.

    Args:
        block: A built `BitTransformerDecoder`, not in training.
        x: Tensor `(batch, tokens, features)`.
        attention_mask, positions, rotary, cache, cache_index: See `BitGroupedQueryAttention`.

    Returns:
        `(y, cache)`, or `None` where its layers must do it.
    """
    if x.shape[1] != 1 or isinstance(cache_index, int):
        return None
    layers, norms = _layers(block), _norms(block)
    activation = block.feed_forward.activation
    if layers is None or norms is None or activation not in ACTIVATIONS:
        return None
    attention, packed = block.attention, [layer.packed_kernel for layer in layers]
    quantizers = [layer.activation_quantizer for layer in layers]
    facts = decoder_block.Facts(
        attention.num_query_heads,
        attention.head_dim,
        activation,
        ACTIVATIONS[activation],
        block.norm_epsilon,
        tuple(map(Facts.of, packed, quantizers)),
    )
    run = decoder_block.choose(facts, x, cache)
    if run is None:
        return None
    products = [
        (ops.convert_to_tensor(w.tiles), ops.convert_to_tensor(w.scale), _float32(layer.row_bias()))
        for w, layer in zip(packed, layers, strict=True)
    ]
    gains = [None if norm is None else _float32(norm.scale) for norm in norms]
    mask = attention.mask_of_cache(attention_mask, 1, cache, cache_index)
    rotary = attention.rotary_of_call(1, positions, rotary, cache_index)
    return run(
        facts,
        x,
        decoder_block.Weights(tuple(products), tuple(gains)),
        cache,
        cache_index,
        None if mask is None else ops.cast(mask, "bool"),
        None if rotary is None else in_float32(rotary),
    )


def _float32(value):
    return None if value is None else ops.cast(value, "float32")


def _layers(block):
    """The layers of `decoder_block.WEIGHTS` in their order, or `None`.

    Each must multiply by a packed kernel, after a norm in those two alone that may have one.
    """
    attention, feed_forward = block.attention, block.feed_forward
    own = type(attention) is BitGroupedQueryAttention and type(feed_forward) is BitFeedForward
    if not own or attention.gate_dense is not None:
        return None
    inputs = [attention.query_dense, attention.key_dense, attention.value_dense]
    inner = [feed_forward.up_dense, *([feed_forward.gate_dense] if feed_forward.gated else [])]
    outputs = [attention.output_dense, feed_forward.down_dense]
    for layer in (*inputs, *inner, *outputs):
        if type(layer) not in (BitLinear, BitEinsumDense) or not layer.is_one_product:
            return None
    if any(layer.normalization is not None for layer in (*inputs, *inner)):
        return None
    return [*inputs, outputs[0], inner[0], outputs[1], *inner[1:]]


def _norms(block):
    """The norms before `decoder_block.GAINS`, of which the inner ones may be `None`, or `None`."""
    norms = [
        block.attention_norm,
        getattr(block.attention.output_dense, "normalization", None),
        block.feed_forward_norm,
        getattr(block.feed_forward.down_dense, "normalization", None),
    ]
    for norm in norms:
        rms = type(norm) is RMSNormalization and norm.axis == [-1]
        if norm is not None and not (rms and norm.epsilon == block.norm_epsilon):
            return None
    return norms
