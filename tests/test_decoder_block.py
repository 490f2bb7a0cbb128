"""New tokens through a block of a decoder by one operator, against the layers it stands for."""

import keras
import numpy as np
import pytest
from helpers import (
    BACKEND,
    assert_same_tokens,
    compiled,
    no_gradient,
    relative_error,
    to_numpy,
)
from keras import ops
from test_models import make_model

from keras_bitnet import kernels, pack_model
from keras_bitnet.kernels import decoder_block, native
from keras_bitnet.kernels.cuda import library
from keras_bitnet.layers import (
    BitTransformerDecoder,
    decode_at_once,
    key_value_cache,
    make_cache,
)
from keras_bitnet.quantizers import Int4

if native.library() is None:
    pytest.skip(native.reason(), allow_module_level=True)
GPU = library.reason(0) is None
if GPU and BACKEND == "tensorflow":
    pytest.skip("TensorFlow runs the layers on a GPU", allow_module_level=True)

FEATURES, LENGTH = 48, 9
BLOCKS = {
    "bitnet": {},
    "llama": {"sub_norm": None, "activation": "silu"},
    "plain": {"gated": False, "activation": "relu", "use_bias": True},
    "window": {"sliding_window": 3, "num_key_value_heads": 6},
    "binary": {"weight_quantizer": "binary"},
    "int4 in groups": {"weight_quantizer": Int4(granularity="group", group_size=32)},
    "trits": {"packed_layout": "trits", "rope_max_wavelength": None},
    "float activations": {"activation_quantizer": None, "weight_quantizer": "int8"},
    "int4 activations": {"activation_quantizer": "int4"},
}
if GPU:
    del BLOCKS["trits"]  # the layers run


def make_block(rng, **arguments):
    """A packed block of random weights; its scales keep the numbers near 1."""
    sizes = {"intermediate_dim": 80, "num_query_heads": 6, "num_key_value_heads": 2, "head_dim": 8}
    block = BitTransformerDecoder(**{**sizes, "packed": True, **arguments})
    block.build((None, None, FEATURES))
    for v in block.variables:
        shape, name = v.shape, v.name
        if name == "kernel_tiles":
            v.assign(
                rng.integers(0, 242, shape) & (0xFF if block.packed_layout == "trits" else 0xAA)
            )
        elif name == "kernel_scale":
            v.assign(rng.uniform(0.05, 0.1, shape))
        elif name in ("scale", "bias"):
            v.assign(rng.uniform(0.5, 1.5, shape))
    return block


def problem(rng, block, batch=2, dtype="float32", cache_dtype="float32", index=5, tokens=1):
    heads = block.attention.num_key_value_heads
    cache = make_cache(batch, LENGTH, heads, block.attention.head_dim, cache_dtype)
    rows = (rng.normal(size=(batch, LENGTH, heads, block.attention.head_dim)) for _ in range(2))
    cache = key_value_cache.write(cache, *(ops.cast(x, dtype) for x in rows), 0)
    x = ops.cast(rng.normal(size=(batch, tokens, FEATURES)), dtype)
    return x, cache, ops.convert_to_tensor(index, "int32")


def run(block, x, cache, index, mask=None, one=True):
    """What the block gives, by the operator, which then must run, or by its layers."""

    def step(x, cache, index, mask):
        return block(x, attention_mask=mask, cache=cache, cache_index=index)

    choose, chosen = decoder_block.choose, []

    def watched(*arguments):
        chosen.append(choose(*arguments) if one else None)
        return chosen[-1]

    decoder_block.choose = watched
    try:
        with no_gradient():
            y, cache = compiled(step, x, {k: ops.copy(v) for k, v in cache.items()}, index, mask)
    finally:
        decoder_block.choose = choose
    assert [found is not None for found in chosen] == [one]
    return floats(y), {name: floats(rows) for name, rows in cache.items()}


def floats(x):
    return to_numpy(ops.cast(x, "float32")).astype("float64")


TOKENS = pytest.mark.parametrize("tokens", [1, 4])


@TOKENS
@pytest.mark.parametrize("name", BLOCKS)
def test_equals_the_layers(name, tokens, rng):
    block = make_block(rng, **BLOCKS[name])
    x, cache, index = problem(rng, block, tokens=tokens)
    mask = None
    if name == "bitnet":
        mask = np.arange(LENGTH) <= 5 + np.arange(tokens)[:, None]
        mask = ops.convert_to_tensor(np.stack([mask] * 2) & (np.arange(LENGTH) != 1))
    y, written = run(block, x, cache, index, mask)
    wanted, rows = run(block, x, cache, index, mask, one=False)
    assert np.isfinite(wanted).all()
    assert wanted.std() > 0.1
    # XLA norms and exponentials round otherwise, which may move a code of an activation; so may the
    # sums of an attention in another order.
    exact = BACKEND != "jax" and name != "llama" and tokens == 1
    assert relative_error(y, wanted) <= (0 if exact else 0.01)
    for key in rows:
        assert relative_error(written[key], rows[key]) <= (0 if BACKEND != "jax" else 0.01)


@pytest.mark.parametrize("name", ["bitnet", "window"])
def test_a_prompt_equals_the_layers(name, rng):
    """It begins a cache: the layers attend to it without one."""
    block = make_block(rng, **BLOCKS[name])
    x, cache, _ = problem(rng, block, tokens=LENGTH - 1)
    padding = np.arange(LENGTH) >= np.array([0, 3])[:, None, None]
    causal = np.arange(LENGTH) <= np.arange(LENGTH - 1)[:, None]
    seen = (causal & padding) | np.eye(LENGTH - 1, LENGTH, dtype=bool)
    for mask in (None, ops.convert_to_tensor(seen)):
        y, written = run(block, x, cache, 0, mask)
        wanted, rows = run(block, x, cache, 0, mask, one=False)
        assert wanted.std() > 0.1
        assert relative_error(y, wanted) < 0.01
        for key in rows:
            assert relative_error(written[key], rows[key]) <= (0 if BACKEND != "jax" else 0.01)


@TOKENS
@pytest.mark.parametrize("cache_dtype", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_every_dtype(dtype, cache_dtype, tokens, rng):
    block = make_block(rng, dtype=dtype)
    given = problem(rng, block, 3, dtype, cache_dtype, tokens=tokens)
    y, written = run(block, *given)
    wanted, rows = run(block, *given, one=False)
    assert relative_error(y, wanted) < 0.02
    for key in rows:
        assert relative_error(written[key], rows[key]) < 0.02


@pytest.mark.parametrize(("batch", "tokens"), [(70, 1), (300, 4)])
def test_many_sequences(batch, tokens, rng):
    """Enough for several threads between the products too, and for several rounds of rows."""
    block = make_block(rng, intermediate_dim=1600)
    given = problem(rng, block, batch=batch, tokens=tokens)
    assert relative_error(run(block, *given)[0], run(block, *given, one=False)[0]) < 0.01


@pytest.mark.skipif(GPU, reason="of the native library")
@TOKENS
def test_every_instruction_set(tokens, rng):
    block = make_block(rng, activation="silu")
    given = problem(rng, block, tokens=tokens)
    y, _ = run(block, *given)
    try:
        for name in native.isas():
            native.set_isa(name)
            assert relative_error(run(block, *given)[0], y) < 0.01, name
    finally:
        native.set_isa("auto")


@TOKENS
def test_nan_and_infinity_stay_in_their_sequence(tokens, rng):
    block = make_block(rng)
    x, cache, index = problem(rng, block, tokens=tokens)
    wanted, _ = run(block, x, cache, index)
    for bad in (np.nan, np.inf):
        broken = floats(x)
        broken[0, 0, 3] = bad
        y, _ = run(block, ops.cast(broken, "float32"), cache, index)
        assert np.isnan(y[0]).all()
        np.testing.assert_array_equal(y[1], wanted[1])


def test_the_layers_run_where_they_do_more(rng):
    def decodes_at_once(change=None, kernel="auto", given=None, cache_dtype="float32", **arguments):
        block = make_block(rng, **arguments)
        if change is not None:
            change(block)
        x, cache, index = problem(rng, block, cache_dtype=cache_dtype)
        found, choose = [], decoder_block.choose
        given = {"cache_index": index, **(given or {})}

        def step(x, cache):
            with kernels.use_kernel(kernel):
                return block(x, cache=cache, **given)[0]

        decoder_block.choose = lambda *given: found.append(choose(*given)) or found[-1]
        try:
            with no_gradient():
                assert np.isfinite(floats(compiled(step, x, cache))).all()
        finally:
            decoder_block.choose = choose
        return found != [] and found[0] is not None

    assert decodes_at_once()
    assert not decodes_at_once(kernel="reference")
    assert not decodes_at_once(given={"training": True})
    assert decodes_at_once(given={"cache_index": 0})
    assert not decodes_at_once(given={"cache_index": 0}, cache_dtype="int8")
    assert not decodes_at_once(given={"cache_index": 0, "attention_mask": np.ones((2, 1, 1), bool)})
    assert not decodes_at_once(given={"cache_index": 0, "padding_mask": np.ones((2, 1), bool)})
    assert not decodes_at_once(activation="gelu")
    assert not decodes_at_once(norm="layer")
    assert not decodes_at_once(sub_norm="layer")
    assert not decodes_at_once(projection_norm="rms")
    assert not decodes_at_once(activation_quantizer="static_int8")
    assert not decodes_at_once(lambda block: block.feed_forward.down_dense.enable_lora(2))
    assert not decodes_at_once(lambda block: setattr(block.attention.key_dense, "_look", print))


@pytest.mark.skipif(BACKEND != "torch", reason="only PyTorch says whether it records a gradient")
def test_the_layers_run_where_a_gradient_is_recorded(rng):
    block = make_block(rng)
    x, cache, index = problem(rng, block)
    x.requires_grad_(True)
    y, _ = block(x, cache=cache, cache_index=index)
    y.sum().backward()
    assert np.isfinite(to_numpy(x.grad)).all()
    assert x.grad.abs().sum() > 0


@pytest.mark.skipif(BACKEND != "jax", reason="the operator has a gradient on JAX alone")
@TOKENS
def test_the_gradient_is_that_of_the_layers(tokens, rng):
    import jax

    block = make_block(rng)
    x, cache, index = problem(rng, block, tokens=tokens)

    def loss(x):
        y, _ = block(x, cache=cache, cache_index=index)
        return ops.sum(ops.sin(y))

    def derivatives():
        slope = jax.jit(lambda x: jax.jvp(loss, (x,), (ops.cos(x),))[1])
        return jax.jit(jax.grad(loss))(x), slope(x)

    found = derivatives()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decoder_block, "choose", lambda *given: None)
        wanted = derivatives()
    for one, other in zip(found, wanted, strict=True):
        assert float(abs(other).max()) > 0
        assert relative_error(floats(one), floats(other)) < 0.02


@pytest.mark.skipif(BACKEND == "jax", reason="JAX looks at shapes while it traces")
@pytest.mark.skipif(GPU, reason="of the native library")
def test_operands_that_do_not_fit_are_errors(rng):
    """A graph that was saved may bring others than those it was traced with."""
    block = make_block(rng)
    x, cache, index = problem(rng, block)
    operands, place = decoder_block.operands, {}

    def changed(*given):
        found = operands(*given)
        found[place["at"]] = place["to"](found[place["at"]])
        return found

    module = decoder_block._ROWS[BACKEND, "native"]()
    cases = (
        (0, lambda x: x[..., :-1], "gain must be"),
        (1, lambda tiles: tiles[:, :-1], "tiles must be"),
        (2, lambda scale: ops.concatenate([scale, scale, scale], 0), "scale must be"),
        (22, lambda gain: gain[:-1], "gain must be"),
        (26, lambda cosines: cosines[..., :-2], "cosines and sines"),
        (29, lambda index: index + 100, "index must be in"),
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "operands", changed)
        for place["at"], place["to"], message in cases:
            before = floats(cache["key"])
            with pytest.raises(Exception, match=message):
                run(block, x, cache, index)
            np.testing.assert_array_equal(floats(cache["key"]), before)


CHAINS = pytest.mark.skipif(BACKEND == "jax" or GPU, reason="no operator takes a chain")
TOGETHER = pytest.mark.skipif(BACKEND != "torch", reason="PyTorch has an operator of all blocks")


@pytest.fixture
def stand_in(monkeypatch):
    """On a processor a loop stands for the operator that runs all blocks on a GPU."""

    def run_all(facts, x, weights, caches, *shared):
        for own, cache in zip(weights, caches, strict=True):
            x, written = decoder_block.reference(facts, x, own, cache, *shared)
            cache.update(written)
        return x

    if not GPU:
        monkeypatch.setattr(decoder_block, "may_run_all", lambda x: True)
        monkeypatch.setattr(decoder_block, "choose_all", lambda facts, x, caches: run_all)


def run_together(blocks, x, caches, index, mask=None):
    with no_gradient():
        return decode_at_once.decode_together(blocks, x, mask, None, caches, index)


@TOGETHER
@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"tokens": 3},
        {"tokens": 4, "intermediate_dim": 9000},
        BLOCKS["plain"],
        BLOCKS["llama"],
        BLOCKS["int4 in groups"],
        BLOCKS["float activations"],
        {"dtype": "bfloat16", "cache_dtype": "int8", "sub_norm": None},
        {"dtype": "float16", "tokens": 2},
    ],
)
def test_all_blocks_at_once_are_one_after_another(arguments, stand_in, rng):
    blocks, x, caches, index, own, _ = make_chain(rng, **arguments)
    y = run_together(blocks, x, own, index)
    with pytest.MonkeyPatch.context() as patch, no_gradient():
        patch.setattr(decoder_block, "choose", lambda *given: None)
        for block, cache in zip(blocks, caches, strict=True):
            x, _ = block(x, cache=cache, cache_index=index)
    # The exponential of silu is another.
    exact = arguments.get("activation") != "silu"
    assert relative_error(floats(y), floats(x)) <= (0 if exact else 0.02)
    for cache, written in zip(caches, own, strict=True):
        for name, rows in cache.items():
            assert relative_error(floats(written[name]), floats(rows)) <= (0 if exact else 0.02)


@TOGETHER
def test_blocks_that_differ_are_not_run_at_once(stand_in, rng):
    def is_run(*others):
        blocks = [make_block(rng, **other) for other in ({}, *others)]
        given = [problem(rng, block) for block in blocks]
        x, _, index = given[0]
        return run_together(blocks, x, [cache for _, cache, _ in given], index) is not None

    assert is_run()
    assert is_run({}, {})
    assert not is_run({"weight_quantizer": "int4"})
    assert not is_run({"sliding_window": 3})
    assert not is_run({"use_bias": True})
    assert not is_run({"sub_norm": None})
    assert not is_run({"norm": "layer"})
    assert not is_run({"dtype": "bfloat16"})


@pytest.mark.skipif(not GPU or BACKEND != "torch", reason="of PyTorch's operator on a GPU")
def test_tensors_that_do_not_fit_are_errors(rng):
    """A graph that was saved may bring others than those it was traced with."""
    import torch

    block = make_block(rng)
    x, cache, index = problem(rng, block)
    facts, weights = decode_at_once._parts(block)
    run = decoder_block._ROWS["torch", "cuda"]().run_all
    tiles, scale, bias = weights.products[0]
    for product, gain, message in (
        ((tiles[:, :-1].contiguous(), scale, bias), None, "tiles"),
        ((tiles, torch.cat([scale] * 3), bias), None, "scale"),
        ((tiles, scale, bias), weights.gains[0][:-1], "gain"),
    ):
        gains = weights.gains if gain is None else (gain, *weights.gains[1:])
        changed = decoder_block.Weights((product, *weights.products[1:]), gains)
        with torch.inference_mode(), pytest.raises(ValueError, match=message):
            run(facts, x, [changed], [cache], index, None, None)
    with torch.inference_mode(), pytest.raises(ValueError, match="of every block"):
        run(facts, x, [weights, changed], [cache, cache], index, None, None)


def make_chain(rng, count=3, dtype="float32", cache_dtype="float32", tokens=1, **arguments):
    """Blocks, their problem, and a copy of the caches with what holds them together."""
    blocks = [make_block(rng, dtype=dtype, **arguments) for _ in range(count)]
    options = {"dtype": dtype, "cache_dtype": cache_dtype, "tokens": tokens}
    given = [problem(rng, block, **options) for block in blocks]
    x, _, index = given[0]
    caches = [{k: ops.copy(v) for k, v in cache.items()} for _, cache, _ in given]
    with no_gradient():
        chain = None if GPU else decode_at_once.chain_of(blocks, caches)
    return blocks, x, [cache for _, cache, _ in given], index, caches, chain


def run_chain(block, x, cache, index, number):
    with no_gradient():
        y, _ = decode_at_once.decode_at_once(block, x, None, None, None, cache, index, number)
    return floats(y)


@CHAINS
@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"tokens": 3},
        BLOCKS["plain"],
        BLOCKS["int4 in groups"],
        {"dtype": "bfloat16", "cache_dtype": "int8", "sub_norm": None},
    ],
)
def test_a_chain_is_its_blocks_one_after_another(arguments, rng):
    blocks, x, caches, index, own, chain = make_chain(rng, **arguments)
    y = run_chain(blocks[0], x, own[0], index, chain.number)
    with no_gradient():
        for block, cache in zip(blocks, caches, strict=True):
            x, _ = block(x, cache=cache, cache_index=index)
    np.testing.assert_array_equal(y, floats(x))
    for cache, written in zip(caches, own, strict=True):
        for name, rows in cache.items():
            np.testing.assert_array_equal(floats(written[name]), floats(rows))


@CHAINS
def test_blocks_that_differ_are_no_chain(rng):
    def is_chain(*others):
        blocks = [make_block(rng), *(make_block(rng, **other) for other in others)]
        caches = [problem(rng, block)[1] for block in blocks]
        with no_gradient():
            return decode_at_once.chain_of(blocks, caches) is not None

    assert is_chain({}, {})
    assert not is_chain({}, {"weight_quantizer": "int4"})
    assert not is_chain({"sliding_window": 3})
    assert not is_chain({"num_key_value_heads": 6})
    assert not is_chain({"use_bias": True})
    assert not is_chain({"sub_norm": None})
    assert not is_chain({"norm": "layer"})
    assert not is_chain({"dtype": "bfloat16"})
    assert not is_chain()
    blocks = [make_block(rng) for _ in range(2)]
    caches = [problem(rng, block)[1] for block in blocks]
    blocks[1].feed_forward.down_dense.enable_lora(2)
    assert decode_at_once.chain_of(blocks, caches) is None


@CHAINS
def test_a_chain_that_is_gone_is_an_error(rng):
    blocks, x, _, index, caches, chain = make_chain(rng)
    number = ops.copy(chain.number)
    del chain
    for gone in (number, number * 0, number * 0 - 5):
        before = floats(caches[0]["key"])
        with pytest.raises(Exception, match="no such chain"):
            run_chain(blocks[0], x, caches[0], index, gone)
        np.testing.assert_array_equal(floats(caches[0]["key"]), before)


@CHAINS
def test_generation_takes_a_chain(monkeypatch):
    keras.utils.set_random_seed(1)
    wide = keras.initializers.RandomNormal(stddev=0.5)
    model = pack_model(make_model(kernel_initializer=wide), verbose=0)
    backbone, prompts, made = type(model.backbone), [[3, 1, 4, 1, 5], [9, 2], [6]], []
    chain_of_blocks = backbone.chain_of_blocks

    def generate(one):
        model.__dict__.pop("_programs", None)
        monkeypatch.setattr(
            backbone,
            "chain_of_blocks",
            lambda *given: made.append(chain_of_blocks(*given) if one else None) or made[-1],
        )
        return model.generate(prompts, max_new_tokens=12)

    wanted = generate(False)
    assert generate(True) == wanted
    assert made[-1] is not None
    # The same programs see weights that were assigned since, of whichever block.
    scale = model.backbone.decoder_layers[1].feed_forward.down_dense.kernel_scale
    scale.assign(scale * -3)
    changed = model.generate(prompts, max_new_tokens=12)
    assert changed != wanted
    assert generate(False) == changed
    # Where there are too many chains, each block is called by itself.
    library = native.library()
    none = np.zeros(64, np.uintp)
    kept = [library.kbn_chain_keep(none.ctypes.data, 1) for _ in range(300)]
    try:
        assert generate(True) == changed
        assert made[-1] is None
    finally:
        for number in filter(None, kept):
            library.kbn_chain_drop(number)
    assert generate(True) == changed
    assert made[-1] is not None


def test_generation_takes_it(monkeypatch):
    keras.utils.set_random_seed(1)
    model = make_model(
        kernel_initializer=keras.initializers.RandomNormal(stddev=0.5),
    )
    model = pack_model(model, verbose=0)
    monkeypatch.setattr(type(model.backbone), "chain_of_blocks", lambda *given: None)
    prompts, chosen, choose = [[3, 1, 4, 1, 5], [9, 2], [6]], [], decoder_block.choose
    monkeypatch.setattr(decoder_block, "choose", lambda *given: None)
    wanted = model.generate(prompts, max_new_tokens=12)
    model.__dict__.pop("_programs")
    monkeypatch.setattr(
        decoder_block, "choose", lambda *given: chosen.append(choose(*given)) or chosen[-1]
    )
    assert_same_tokens(model, model.generate(prompts, max_new_tokens=12), wanted)
    # Of the prompt and of a token.
    at_once = GPU and BACKEND == "torch"
    assert len(chosen) == 2 * (1 if at_once else model.backbone.num_layers)
    assert None not in chosen
    beams = model.generate(prompts, max_new_tokens=6, beams=3)
    assert beams[1] == model.generate(prompts[1], max_new_tokens=6, beams=3)
