import keras
import numpy as np
import oracle
import pytest
from helpers import BACKEND, compiled, gradient, to_numpy
from keras import ops

from keras_bitnet import quantizers
from keras_bitnet.layers import BitLinear
from keras_bitnet.ops import division
from keras_bitnet.quantizers import Binary, Int2, Int4, Int8, Ternary

CLASSES = [Binary, Ternary, Int2, Int4, Int8]
GRANULARITIES = [("tensor", None), ("channel", None), ("group", 32)]


def make(cls, granularity="tensor", group_size=None, **arguments):
    if cls is Int2:
        arguments.setdefault("scale", "absmax")
    return cls(granularity=granularity, group_size=group_size, **arguments)


@pytest.mark.parametrize(("granularity", "group_size"), GRANULARITIES)
@pytest.mark.parametrize("cls", CLASSES)
def test_codes_and_scale_equal_the_oracle(cls, granularity, group_size, rng):
    w = rng.normal(size=(100, 7)).astype("float32")
    quantizer = make(cls, granularity, group_size)
    codes, scale, offset = quantizer.quantize(w)
    expected_codes, expected_scale, expected_offset = oracle.quantize_weight(
        cls.name, w, granularity, group_size
    )
    assert offset == expected_offset
    assert scale.shape == quantizer.scale_shape(100, 7)
    np.testing.assert_array_equal(to_numpy(codes), expected_codes)
    expanded = np.broadcast_to(np.repeat(to_numpy(scale), group_size or 100, axis=0)[:100], w.shape)
    np.testing.assert_allclose(expanded, expected_scale, rtol=1e-6)


@pytest.mark.parametrize("scale", ["absmedian", "absmax"])
def test_ternary_statistics(scale, rng):
    w = rng.normal(size=(33, 6)).astype("float32")
    codes, _, _ = make(Ternary, "channel", scale=scale).quantize(w)
    expected, _, _ = oracle.quantize_weight("ternary", w, "channel", scale=scale)
    np.testing.assert_array_equal(to_numpy(codes), expected)


@pytest.mark.parametrize(("granularity", "group_size"), GRANULARITIES)
@pytest.mark.parametrize("cls", CLASSES)
def test_fake_quantize_is_dequantized_quantize_bit_for_bit(cls, granularity, group_size, rng):
    w = rng.normal(size=(70, 5)).astype("float32")
    quantizer = make(cls, granularity, group_size)
    fake = to_numpy(quantizer.fake_quantize(w))
    np.testing.assert_array_equal(fake, to_numpy(quantizer.dequantize(quantizer.quantize(w))))


@pytest.mark.parametrize("cls", CLASSES)
def test_gradient_is_identity_at_any_strength(cls, rng):
    w = rng.normal(size=(12, 4)).astype("float32")
    upstream = rng.normal(size=w.shape).astype("float32")
    quantizer = make(cls)
    for strength in (None, 0.3, 1.0):
        g = gradient(
            lambda v, s=strength: ops.sum(
                ops.multiply(quantizer.fake_quantize(v, strength=s), upstream)
            ),
            w,
        )
        np.testing.assert_array_equal(g, upstream)


def test_clipped_gradient_stops_outside_the_grid():
    w = np.array([[0.1, -0.2, 3.0, -0.3]], "float32")  # mean 0.9: only 3.0 is past 1.5 steps
    quantizer = Ternary(gradient="clipped")
    g = gradient(lambda v: ops.sum(quantizer.fake_quantize(v)), w)
    np.testing.assert_array_equal(g, [[1, 1, 0, 1]])
    g = gradient(lambda v: ops.sum(quantizer.fake_quantize(v, strength=0.25)), w)
    np.testing.assert_array_equal(g, [[1, 1, 0.75, 1]])


@pytest.mark.parametrize("cls", [Ternary, Int2, Int4, Int8])
def test_learned_step_has_the_gradients_of_lsq(cls, rng):
    w = rng.normal(size=(40, 3)).astype("float32")
    quantizer = cls(scale="learned", granularity="channel")
    scale = to_numpy(quantizer.compute_scale(w)) * np.float32(0.7)  # so that some weights clip
    ratio = w / scale
    low, high = quantizer.lowest, quantizer.highest
    half = quantizer.offset % 1
    levels = np.clip(np.round(ratio - half) + half, low, high)
    margin = 0.5 if cls is Int2 else 0
    inside = (ratio >= low - margin) & (ratio <= high + margin)
    assert 0 < inside.mean() < 1
    damping = 1 / np.sqrt(40 * max(high, 1))
    expected = np.where(inside, levels - ratio, levels).sum(axis=0, keepdims=True) * damping

    np.testing.assert_array_equal(to_numpy(quantizer.fake_quantize(w, scale)), levels * scale)
    g_scale = gradient(lambda s: ops.sum(quantizer.fake_quantize(w, s)), scale)
    np.testing.assert_allclose(g_scale, expected, rtol=2e-4, atol=1e-5)
    g_weight = gradient(lambda v: ops.sum(quantizer.fake_quantize(v, scale)), w)
    np.testing.assert_allclose(g_weight, inside, rtol=1e-6)


@pytest.mark.parametrize("strength", [0.0, 0.25, 1.0])
def test_strength_blends(strength, rng):
    w = rng.normal(size=(8, 8)).astype("float32")
    quantizer = Ternary()
    full = to_numpy(quantizer.fake_quantize(w))
    mixed = to_numpy(quantizer.fake_quantize(w, strength=strength))
    np.testing.assert_allclose(mixed, (1 - strength) * w + strength * full, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(("granularity", "group_size"), GRANULARITIES)
@pytest.mark.parametrize(
    ("cls", "scale"), [(cls, scale) for cls in CLASSES for scale in cls.scales]
)
def test_restore_gives_the_codes_and_scale_back(cls, scale, granularity, group_size, rng):
    quantizer = cls(scale=scale, granularity=granularity, group_size=group_size)
    w = rng.normal(size=(70, 6)).astype("float32")
    w[:, 2] = 0
    first = quantizer.quantize(w)
    restored = quantizer.restore(first)
    learned = first.scale if quantizer.learned else None
    again = quantizer.quantize(restored, learned)
    np.testing.assert_allclose(
        to_numpy(quantizer.dequantize(again)), to_numpy(quantizer.dequantize(first)), rtol=1e-5
    )


def test_restore_where_the_median_lies_between_two_far_values():
    quantizer = Ternary(scale="absmedian")
    first = quantizer.quantize(np.array([[0.0], [0.1], [1.9], [2.0]], "float32"))
    again = quantizer.quantize(quantizer.restore(first))
    np.testing.assert_array_equal(to_numpy(again.codes), to_numpy(first.codes))
    np.testing.assert_allclose(to_numpy(again.scale), [[1.0]], rtol=1e-6)


def test_binary_has_no_zero():
    codes, _, _ = Binary().quantize(np.array([[0.0, -0.0, 1e-30, -1e-30]], "float32"))
    np.testing.assert_array_equal(to_numpy(codes), [[1, 1, 1, 0]])


@pytest.mark.parametrize("cls", CLASSES)
def test_zeros_quantize_to_zero_or_the_smallest_scale(cls):
    quantized = make(cls).quantize(np.zeros((5, 3), "float32"))
    values = to_numpy(make(cls).dequantize(quantized))
    assert np.isfinite(values).all()
    assert np.abs(values).max() <= 1e-5


@pytest.mark.parametrize("cls", CLASSES)
def test_master_weight_in_low_precision_is_quantized_in_float32(cls, rng):
    w = ops.cast(rng.normal(size=(64, 8)).astype("float32"), "bfloat16")
    as_float = to_numpy(ops.cast(w, "float32"))
    np.testing.assert_array_equal(
        to_numpy(make(cls).quantize(w).codes), to_numpy(make(cls).quantize(as_float).codes)
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("per_tensor", [False, True])
@pytest.mark.parametrize(("name", "top"), [("int8", 127), ("int4", 7)])
def test_activation_codes_equal_the_oracle(name, top, per_tensor, dtype, rng):
    x = ops.cast(rng.normal(size=(2, 5, 31)).astype("float32"), dtype)
    quantizer = type(quantizers.get_activation(name))(
        granularity="tensor" if per_tensor else "token"
    )
    codes, scale = quantizer.quantize(x)
    expected, expected_scale = oracle.quantize_activation(
        to_numpy(ops.cast(x, "float32")), top, per_tensor
    )
    np.testing.assert_array_equal(to_numpy(codes), expected)
    np.testing.assert_array_equal(to_numpy(scale), expected_scale)
    fake = quantizer.fake_quantize(x)
    assert keras.backend.standardize_dtype(fake.dtype) == dtype
    wanted = to_numpy(ops.cast(ops.cast(codes, "float32") * scale, dtype))
    np.testing.assert_array_equal(to_numpy(fake).astype("float32"), wanted.astype("float32"))


def test_activation_codes_at_the_ties(rng):
    """Values next to the middle of two codes tell IEEE division from an approximate one."""
    largest = rng.uniform(1, 2, (2000, 1)).astype("float32")
    middles = (np.arange(-126, 126) + 0.5) / 127
    x = np.concatenate([largest, (largest * middles).astype("float32")], axis=1)
    expected, _ = oracle.quantize_activation(x)
    codes, _ = quantizers.get_activation("int8").quantize(x)
    np.testing.assert_array_equal(to_numpy(codes), expected)


@pytest.mark.skipif(BACKEND != "jax", reason="XLA divides approximately on a GPU")
@pytest.mark.parametrize("units", [-2, -1, 0, 1, 2])
def test_an_approximate_quotient_is_refined(units, rng):
    x = rng.normal(size=100_000).astype("float32") * 10.0 ** rng.integers(-6, 6, 100_000)
    y = rng.uniform(1e-5, 1e3, 100_000).astype("float32")
    x = np.concatenate([x.astype("float32"), np.float32([127, 127, 0, np.inf, 1])])
    y = np.concatenate([y, np.float32([np.inf, np.nan, 3, 2, 0])])
    with np.errstate(divide="ignore"):
        wanted = x / y
    bits = wanted.view("int32") + units * (np.isfinite(wanted) & (wanted != 0))
    found = compiled(division.refined, x, bits.astype("int32").view("float32"), y)
    np.testing.assert_array_equal(to_numpy(found), wanted)


def test_activation_gradient_is_identity(rng):
    x = rng.normal(size=(3, 9)).astype("float32")
    upstream = rng.normal(size=x.shape).astype("float32")
    quantizer = quantizers.get_activation("int8")
    g = gradient(lambda v: ops.sum(ops.multiply(quantizer.fake_quantize(v), upstream)), x)
    np.testing.assert_array_equal(g, upstream)


def test_static_activation_codes_are_those_of_the_given_scale(rng):
    x = rng.normal(size=(6, 100)).astype("float32")
    scale = np.float32(0.0123)
    quantizer = quantizers.ActivationInt8("static")
    codes, scales = quantizer.quantize(x, scale)
    wanted = np.clip(np.rint(x * (np.float32(1) / scale)), -127, 127)
    np.testing.assert_array_equal(to_numpy(codes), wanted)
    np.testing.assert_array_equal(to_numpy(scales), np.full((6, 1), scale))
    assert (np.abs(wanted) == 127).any()
    with pytest.raises(ValueError, match="takes a static `scale`"):
        quantizer.quantize(x)
    with pytest.raises(ValueError, match="takes no `scale`"):
        quantizers.get_activation("int8").quantize(x, scale)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_activations_that_are_not_finite_stay_visible(bad):
    x = np.ones((2, 4), "float32")
    x[0, 1] = bad
    _, scale = quantizers.get_activation("int8").quantize(x)
    assert not np.isfinite(to_numpy(scale)[0, 0])
    assert np.isfinite(to_numpy(scale)[1, 0])


@pytest.mark.parametrize("cls", CLASSES)
def test_serialization(cls):
    quantizer = cls(granularity="group", group_size=96, gradient="clipped", epsilon=1e-4)
    again = quantizers.deserialize(quantizers.serialize(quantizer))
    assert again == quantizer
    assert type(again) is cls
    assert quantizers.get(cls.name) == cls()
    assert quantizers.get(quantizer) is quantizer
    assert cls().bits_per_weight <= cls().bits


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: quantizers.get("int3"), "Unknown weight quantizer"),
        (lambda: quantizers.get(3), "of type int"),
        (lambda: quantizers.get(quantizers.ActivationInt8()), "A weight quantizer is one of"),
        (lambda: quantizers.get_activation("ternary"), "Unknown activation quantizer"),
        (lambda: Ternary(scale="max"), "Received: scale='max'"),
        (lambda: Int8(scale="absmean"), "Received: scale='absmean'"),
        (lambda: Ternary(granularity="row"), "Received: granularity='row'"),
        (lambda: Ternary(group_size=48), "Received: group_size=48"),
        (lambda: Ternary(group_size=0), "Received: group_size=0"),
        (lambda: Ternary(gradient="none"), "Received: gradient='none'"),
        (lambda: Ternary(epsilon=0), "Received: epsilon=0"),
        (lambda: Int2(levels="odd"), "Received: levels='odd'"),
        (lambda: Ternary().quantize(np.zeros(3)), r"Received: weight.shape=\(3,\)"),
    ],
)
def test_bad_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_kernels_know_a_quantizer_by_what_it_computes():
    class Shifted(Ternary):
        def compute_scale(self, weight):
            return 2 * super().compute_scale(weight)

    class Truncated(Ternary):
        def round_levels(self, ratio):
            return ops.floor(ratio)

    assert {cls.formula for cls in (Ternary, Int2, Int4, Int8)} == {"nearest"}
    assert Binary.formula == "sign"
    assert Shifted().formula == "nearest"  # kernels are given the scale
    assert Truncated().formula == "Truncated"
    weight = np.array([[0.75, 1.25]], "float32")
    np.testing.assert_array_equal(to_numpy(Truncated().fake_quantize(weight)), [[0, 1]])


@pytest.mark.skipif(BACKEND != "torch", reason="torch.compile is PyTorch's")
@pytest.mark.usefixtures("whole_graph")
@pytest.mark.parametrize("weights", ["ternary", "binary", "int2", "int8"])
@pytest.mark.parametrize("inputs", ["int8", "int4"])
def test_torch_compile_traces_a_training_layer_whole(weights, inputs, rng):
    import torch

    torch._dynamo.reset()
    layer = BitLinear(8, weight_quantizer=weights, activation_quantizer=inputs, norm="rms")
    x = ops.convert_to_tensor(rng.normal(size=(4, 16)).astype("float32"))
    wanted = layer(x)
    assert torch.equal(torch.compile(layer, fullgraph=True, backend="eager")(x), wanted)
