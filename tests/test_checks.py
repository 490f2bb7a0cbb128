"""Arguments of a wrong type or out of range: one wording, one kind of error."""

import pytest
from helpers import once

from keras_bitnet.callbacks import AdaptivePrecision, QuantizationScheduler, TwoStageSchedule
from keras_bitnet.checks import check_number
from keras_bitnet.layers import (
    BitConv2D,
    BitDepthwiseConv2D,
    BitEmbedding,
    BitFeedForward,
    BitGroupedQueryAttention,
    BitLinear,
    BitTransformerEncoder,
)
from keras_bitnet.models import BitNetBackbone, Sampler
from keras_bitnet.quantizers import ActivationInt8, StaticActivation, Ternary

pytestmark = once


@pytest.mark.parametrize(
    ("interval", "accepted", "refused"),
    [
        ("[0, 1]", (0, 0.5, 1), (-1e-9, 1.1, float("nan"))),
        ("(0, 1)", (0.5,), (0, 1)),
        ("[0, inf)", (0, 1e30), (float("inf"), -1)),
        ("(0, inf]", (float("inf"),), (0, "a", None, [1])),
    ],
)
def test_numbers_lie_in_their_interval(interval, accepted, refused):
    for value in accepted:
        check_number("x", value, interval)
    for value in refused:
        with pytest.raises(ValueError, match=r"`x` must be a number in .*Received: x="):
            check_number("x", value, interval)


def backbone(**changes):
    sizes = dict.fromkeys(("num_query_heads", "num_key_value_heads", "num_layers"), 1)
    return BitNetBackbone(
        **{**sizes, "vocabulary_size": 8, "hidden_dim": 8, "intermediate_dim": 8, **changes}
    )


@pytest.mark.parametrize(
    ("make", "name", "value"),
    [
        (lambda v: BitLinear(v), "units", True),
        (lambda v: BitLinear(2, smoothing=v), "smoothing", "a"),
        (lambda v: BitLinear(2, quantization_strength=v), "quantization_strength", None),
        (lambda v: BitLinear(2, lora_rank=v), "lora_rank", 0.5),
        (lambda v: BitLinear(2, norm_epsilon=v), "norm_epsilon", None),
        (lambda v: BitFeedForward(2, norm_epsilon=v), "norm_epsilon", -1),
        (lambda v: BitConv2D(4, 3, groups=v), "groups", 0),
        (lambda v: BitConv2D(4, v), "kernel_size", 2.5),
        (lambda v: BitConv2D(4, 3, strides=(1, v)), "strides", 0),
        (lambda v: BitDepthwiseConv2D(3, depth_multiplier=v), "depth_multiplier", "a"),
        (lambda v: BitEmbedding(v, 2), "input_dim", 1.0),
        (lambda v: BitFeedForward(v), "intermediate_dim", None),
        (lambda v: BitTransformerEncoder(4, v), "num_heads", -1),
        (lambda v: BitGroupedQueryAttention(4, 2, 2, sliding_window=v), "sliding_window", 0),
        (
            lambda v: BitGroupedQueryAttention(4, 2, 2, rope_max_wavelength=v),
            "rope_max_wavelength",
            "a",
        ),
        (lambda v: backbone(num_layers=v), "num_layers", 0),
        (lambda v: backbone(num_query_heads=v), "num_query_heads", 0),
        (lambda v: Ternary(epsilon=v), "epsilon", "a"),
        (lambda v: ActivationInt8(epsilon=v), "epsilon", 0),
        (lambda v: StaticActivation(momentum=v), "momentum", "a"),
        (lambda v: Sampler(temperature=v), "temperature", -1),
        (lambda v: Sampler(top_p=v), "top_p", "a"),
        (lambda v: QuantizationScheduler(end=v), "end", None),
        (lambda v: QuantizationScheduler(end=3, start=v), "start", "a"),
        (lambda v: TwoStageSchedule(v), "learning_rate", "a"),
        (lambda v: TwoStageSchedule(1e-3, switch=v), "switch", 1),
        (lambda v: AdaptivePrecision(hysteresis=v), "hysteresis", "a"),
    ],
)
def test_arguments_are_refused_by_name(make, name, value):
    with pytest.raises(ValueError, match=rf"`{name}` must be .*Received: {name}="):
        make(value)
