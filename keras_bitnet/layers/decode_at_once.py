"""A packed block of a decoder for new tokens: where it can be, one operator."""

import keras
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


def decode_at_once(block, x, attention_mask, positions, rotary, cache, cache_index, chain=None):
    """What a block of a decoder makes of new tokens of each sequence.

    Args:
        block: A built `BitTransformerDecoder`, not in training.
        x: Tensor `(batch, tokens, features)`.
        attention_mask, positions, rotary, cache, cache_index: See `BitGroupedQueryAttention`.
        chain: The number of a `chain_of` it and the blocks after it, which then decode too.

    Returns:
        `(y, cache)`, or `None` where its layers must do it.
    """
    if not _sees_cache(attention_mask, x, cache, cache_index):
        return None
    parts = _parts(block)
    run = None if parts is None else decoder_block.choose(parts[0], x, cache)
    if run is None:
        return None
    facts, weights = parts
    shared = _shared(block, x, attention_mask, positions, rotary, cache, cache_index)
    more = {} if chain is None else {"chain": chain}
    return run(facts, x, weights, cache, *shared, **more)


def decode_together(blocks, x, attention_mask, rotary, caches, cache_index):
    """What blocks of a decoder make of new tokens one after another, where one operator runs all.

    Args:
        blocks: Layers that `decode_at_once` may take.
        caches: The cache of each.
        x, attention_mask, rotary, cache_index: See `decode_at_once`.

    Returns:
        `y`, and the caches hold the new tokens; or `None`.
    """
    if not decoder_block.may_run_all(x):
        return None
    if not _sees_cache(attention_mask, x, caches[0], cache_index):
        return None
    parts = _alike(blocks)
    run = None if parts is None else decoder_block.choose_all(parts[0][0], x, caches)
    if run is None:
        return None
    shared = _shared(blocks[0], x, attention_mask, None, rotary, caches[0], cache_index)
    return run(parts[0][0], x, [weights for _, weights in parts], caches, *shared)


def _shared(block, x, attention_mask, positions, rotary, cache, cache_index):
    """The operands after the cache, the same for all blocks: index, mask and rotary tables."""
    attention, tokens = block.attention, x.shape[1]
    mask = attention.mask_of_cache(attention_mask, tokens, cache, cache_index)
    rotary = attention.rotary_of_call(tokens, positions, rotary, cache_index)
    mask = None if mask is None else ops.cast(mask, "bool")
    return cache_index, mask, None if rotary is None else in_float32(rotary)


def _alike(blocks):
    """The parts of blocks that differ in nothing but their weights, or `None`."""
    parts, first = [], None
    for block in blocks:
        own = _parts(block)
        if own is None:
            return None
        parts.append(own)
        kind = own[0], block.compute_dtype, block.attention.sliding_window, _shapes(own[1])
        first = first or kind
        if kind != first:
            return None
    return parts


def _shapes(weights):
    """What may differ between `Weights` of the same facts: shapes of scales, and what is there."""
    others = (tensor for product in weights.products for tensor in product[1:])
    # As integers: where PyTorch traces, sizes are tensors.
    shapes = [None if x is None else tuple(map(int, x.shape)) for x in others]
    return shapes, [gain is None for gain in weights.gains]


def chain_of(blocks, caches):
    """A `Chain` of blocks one after another, or `None` where each must run by itself.

    Args:
        blocks: Layers that `decode_at_once` may take.
        caches: The cache of each: as long as the chain is used, they stay where they are, and the
            weights what they are now.
    """
    first = _parts(blocks[0]) if decoder_block.Chain.possible() else None
    if first is None or len(blocks) < 2:
        return None
    sizes = caches[0]["key"].shape[0], 1, first[0].weights[0].in_features
    if decoder_block.choose(first[0], ops.zeros(sizes, blocks[0].compute_dtype), caches[0]) is None:
        return None
    parts = _alike(blocks)
    return parts and decoder_block.Chain.of([weights for _, weights in parts], caches)


def _parts(block):
    """The `Facts` and `Weights` of a block, or `None` where its layers do more than multiply."""
    layers, norms = _layers(block), _norms(block)
    activation = block.feed_forward.activation
    if layers is None or norms is None or activation not in ACTIVATIONS:
        return None
    packed = [layer.packed_kernel for layer in layers]
    quantizers = [layer.activation_quantizer for layer in layers]
    facts = decoder_block.Facts(
        block.attention.num_query_heads,
        block.attention.head_dim,
        activation,
        ACTIVATIONS[activation],
        block.norm_epsilon,
        tuple(map(Facts.of, packed, quantizers)),
    )
    products = [
        (w.tiles, w.scale, _float32(layer.row_bias()))
        for w, layer in zip(packed, layers, strict=True)
    ]
    gains = [None if norm is None else _float32(norm.scale) for norm in norms]
    return facts, decoder_block.Weights(tuple(products), tuple(gains))


def _sees_cache(mask, x, cache, cache_index):
    """Whether tokens attend to what they leave in the cache: with the layers a prompt need not."""
    if not isinstance(cache_index, int) or cache_index != 0:
        return True
    length, dtype = cache["key"].shape[2], cache["key"].dtype
    fits = mask is None or tuple(mask.shape[1:]) == (x.shape[1], length)
    return fits and dtype == x.dtype


def _float32(value):
    # `cast` takes TensorFlow 80 us, even where there is nothing to do, and conversions PyTorch 10.
    value = value.value if isinstance(value, keras.Variable) else value
    if value is not None and keras.backend.backend() == "torch":
        return value.float()
    return None if value is None else ops.convert_to_tensor(value, "float32")


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
