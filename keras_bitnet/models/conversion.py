"""From a float decoder to one that trains to 1.58 bits: the start of continual QAT."""

import numpy as np
from keras import ops

from keras_bitnet.checks import check_choice
from keras_bitnet.layers.base import BitLayer
from keras_bitnet.layers.inputs import watch_inputs
from keras_bitnet.models.backbone import tokens_and_mask
from keras_bitnet.models.causal_lm import BitNetCausalLM
from keras_bitnet.transforms.converted import child_layers, get_child
from keras_bitnet.transforms.rewrite import copy_own_weights


def convert_to_bitnet(
    model,
    data=None,
    *,
    weight_quantizer="ternary",
    activation_quantizer="int8",
    sub_norm="rms",
    quantization_strength=0.0,
):
    """Returns a copy of a float decoder with sub-norms and low-bit layers, ready to be trained on.

    What was learnt is kept, and quantization comes in slowly: the layers start at
    `quantization_strength` 0, and `keras_bitnet.callbacks.QuantizationScheduler` raises it during
    `fit`. A `BitDistiller` lets the float model teach the copy meanwhile. At the end
    `keras_bitnet.pack_model` packs it.

    A sub-norm before the last projection of each block keeps the scale of low-bit activations
    steady, but a float model was trained without it. With `data`, each channel `i` of it gets the
    gain with the least squared error over the tokens of the float model,

        x_i ~ gain_i * x_i / rms(x),    gain_i = sum(x_i^2 / rms(x)) / sum(x_i^2 / rms(x)^2)

    so that the copy begins near the float model. Without `data` the gains are 1.

    Args:
        model: Float `BitNetCausalLM`, as `keras_bitnet.interop` reads it from Hugging Face, GGUF
            and KerasHub; it is left as it is.
        data: A few sequences for the gains: token ids `(batch, length)` or a dictionary
            `{"token_ids", "padding_mask"}`, run as one batch; or `None`.
        weight_quantizer, activation_quantizer: Of the projections, see
            `keras_bitnet.layers.BitLayer`.
        sub_norm: `"rms"`, or `None`: no sub-norms are added. A model that has them keeps them.
        quantization_strength: Where training starts, in [0, 1].

    Returns:
        `BitNetCausalLM`, not compiled, with the tokenizer of `model`.

    Raises:
        ValueError: `model` is no `BitNetCausalLM`, is packed or has LoRA weights; an argument is
            out of range.

    Example:
    >>> teacher = keras_bitnet.interop.from_hugging_face("path/of/llama")
    >>> student = keras_bitnet.models.convert_to_bitnet(teacher, tokens[:8])
    >>> student.compile("adamw", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    >>> student.fit(tokens[:, :-1], tokens[:, 1:], callbacks=[
    ...     keras_bitnet.callbacks.QuantizationScheduler(end=1000, update_freq=10)
    ... ])
    >>> packed = keras_bitnet.pack_model(student)

    Source:
        Wu et al. 2025, BitNet Distillation (https://arxiv.org/abs/2510.13998), the sub-norms; the
        gains from data are not in it. The warm-up of the strength is that of
        https://huggingface.co/blog/1_58_llm_extreme_quantization.
    """
    _check_source(model)
    check_choice("sub_norm", sub_norm, (None, "rms"))
    present = model.backbone.sub_norm
    converted = model.remade(
        weight_quantizer=weight_quantizer,
        activation_quantizer=activation_quantizer,
        sub_norm=present or sub_norm,
        quantization_strength=quantization_strength,
    )
    _copy_weights(model, converted)
    if data is not None and converted.backbone.sub_norm != present:
        for norm, gains in _sub_norm_gains(model, converted, data):
            norm.scale.assign(gains)
    return converted


def _check_source(model):
    if not isinstance(model, BitNetCausalLM):
        raise ValueError(
            "`convert_to_bitnet` takes a `BitNetCausalLM`; `keras_bitnet.interop` reads one from "
            f"Hugging Face, GGUF and KerasHub. Received: {type(model).__name__}"
        )
    if model.packed:
        raise ValueError(
            "The weights of a packed model are no longer float. Unpack it with "
            "`keras_bitnet.unpack_model`, or read the float checkpoint. Received: packed=True"
        )
    for layer in model._flatten_layers():
        if getattr(layer, "lora_enabled", False):
            raise ValueError(f"Layer '{layer.name}' has LoRA weights, which are not converted.")


def _copy_weights(old, new):
    """Copies every weight but the strength and what was not there."""
    if isinstance(old, BitLayer):
        new.take_weights(old)
    else:
        copy_own_weights(old, new)
    for path, child in child_layers(old).items():
        _copy_weights(child, get_child(new, path))


def _sub_norm_gains(model, converted, data):
    """Gives `(norm, gains)` for each sub-norm that was added; see `convert_to_bitnet`."""
    lasts = [
        [layer for b in m.backbone.decoder_layers for layer in _last_projections(b)]
        for m in (model, converted)
    ]
    sums: dict[BitLayer, tuple[np.ndarray, np.ndarray]] = {}

    def look(layer, x):
        x = np.asarray(ops.convert_to_numpy(ops.cast(x, "float32")), "float64")
        x = x.reshape(-1, x.shape[-1])[mask]
        rms = np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + model.backbone.norm_epsilon)
        sums[layer] = np.sum(x**2 / rms, axis=0), np.sum((x / rms) ** 2, axis=0)

    tokens, mask = tokens_and_mask(data)
    mask = np.ones(np.size(tokens), bool) if mask is None else np.asarray(mask, bool).reshape(-1)
    with watch_inputs(lasts[0], look):
        model(data)
    for old, new in zip(*lasts, strict=True):
        above, below = sums[old]
        alive = below > 0
        mean = np.sum(above) / max(np.sum(below), 1e-30)
        yield new.normalization, np.where(alive, above / np.where(alive, below, 1), mean or 1.0)


def _last_projections(block):
    return block.attention.output_dense, block.feed_forward.down_dense
