"""`config.json` of a Hugging Face checkpoint and the arguments of `BitNetBackbone`."""

import dataclasses
import math

from keras import activations

from keras_bitnet.layers.bit_feed_forward import relu_squared

BITNET, LLAMA = "bitnet", "llama"
ACTIVATIONS = ("relu2", "silu")
QUANTIZATION = "quantization_config"


@dataclasses.dataclass(frozen=True)
class Variant:
    """How a checkpoint keeps the weights of its projections.

    Attributes:
        name: `"online"`, `"offline"`, `"bitlinear"` or `"float"`.
        packed: Whether they are packed codes and a `weight_scale`.
        inverse: Whether that is the inverse of the scale.
        quantization_config: What `config.json` says, or `None`.
    """

    name: str
    packed: bool
    inverse: bool
    quantization_config: dict | None


def _quantization(linear_class, mode):
    return {
        "quant_method": "bitnet",
        "linear_class": linear_class,
        "quantization_mode": mode,
        "modules_to_not_convert": ["lm_head"],
    }


VARIANTS = {
    variant.name: variant
    for variant in (
        Variant("online", False, False, _quantization("autobitlinear", "online")),
        Variant("offline", True, False, _quantization("autobitlinear", "offline")),
        Variant("bitlinear", True, True, _quantization("bitlinear", "offline")),
        Variant("float", False, False, None),
    )
}


def read_variant(config):
    """The `Variant` of a checkpoint.

    Raises:
        ValueError: It is quantized by another method.
    """
    quantization = config.get(QUANTIZATION)
    if quantization is None:
        return VARIANTS["float"]
    if not isinstance(quantization, dict):
        raise ValueError(f"`{QUANTIZATION}` must be an object. Received: {quantization!r}")
    method = quantization.get("quant_method")
    linear_class = quantization.get("linear_class") or "bitlinear"
    mode = quantization.get("quantization_mode") or "offline"
    # The class alone says whether the scale is inverted: its size is no hint.
    names = {("autobitlinear", "online"): "online", ("autobitlinear", "offline"): "offline"}
    name = "bitlinear" if linear_class == "bitlinear" else names.get((linear_class, mode))
    if method != "bitnet" or name is None:
        raise ValueError(
            "Checkpoints of `quant_method` 'bitnet' can be read, of `linear_class` 'bitlinear' or "
            "'autobitlinear' ('online' or 'offline'), and float ones. "
            f"Received: {method!r}, {linear_class!r}, {mode!r}"
        )
    return VARIANTS[name]


def read_arguments(config):
    """The arguments of `BitNetBackbone` that a `config.json` describes.

    Raises:
        ValueError: A size is missing or no positive integer, or the model has a part that the
            backbone does not.
    """
    kind = config.get("model_type")
    if kind not in (BITNET, LLAMA):
        raise ValueError(f"`model_type` must be '{BITNET}' or '{LLAMA}'. Received: {kind!r}")
    for name in ("attention_bias", "mlp_bias"):
        if config.get(name):
            raise ValueError(f"Projections with biases cannot be read. Received: {name}=true")
    heads = _size(config, "num_attention_heads")
    hidden_dim = _size(config, "hidden_size")
    activation = config.get("hidden_act", "relu2" if kind == BITNET else "silu")
    if activation not in ACTIVATIONS:
        raise ValueError(f"`hidden_act` must be one of {ACTIVATIONS}. Received: {activation!r}")
    head_dim = _size(config, "head_dim") if config.get("head_dim") else hidden_dim // heads
    arguments = {
        "vocabulary_size": _size(config, "vocab_size"),
        "num_layers": _size(config, "num_hidden_layers"),
        "num_query_heads": heads,
        "num_key_value_heads": _size(config, "num_key_value_heads", heads),
        "hidden_dim": hidden_dim,
        "intermediate_dim": _size(config, "intermediate_size"),
        "head_dim": head_dim,
        "activation": activation,
        "sub_norm": "rms" if kind == BITNET else None,
        "norm_epsilon": _number(config, "rms_norm_eps", 1e-5 if kind == BITNET else 1e-6),
        "tie_word_embeddings": bool(config.get("tie_word_embeddings", False)),
        "max_sequence_length": _size(config, "max_position_embeddings", 2048),
        **_rope(config),
    }
    quantization = config.get(QUANTIZATION) or {}
    if quantization.get("use_rms_norm"):
        epsilon = quantization.get("rms_norm_eps", 1e-6)
        if kind == BITNET or epsilon != arguments["norm_epsilon"]:
            raise ValueError(
                "Norms in every projection (`use_rms_norm`) can be read for `model_type` 'llama' "
                f"with the epsilon of the other norms. Received: {kind!r}, epsilon {epsilon} and "
                f"{arguments['norm_epsilon']}"
            )
        arguments["projection_norm"] = "rms"
    return arguments


def _rope(config):
    """Newer files have `rope_parameters`, older ones `rope_theta` and `rope_scaling`."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise ValueError(f"`rope_parameters` must be an object. Received: {rope!r}")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "linear"):
        raise ValueError(
            f"The rotary embedding must be of type 'default' or 'linear'. Received: {kind!r}"
        )
    default = 500000.0 if config.get("model_type") == BITNET else 10000.0
    theta = _number(rope, "rope_theta", _number(config, "rope_theta", default))
    factor = _number(rope, "factor", 1.0) if kind == "linear" else 1.0
    return {"rope_max_wavelength": theta, "rope_scaling_factor": factor}


def _size(config, name, default=None):
    value = config.get(name, default)
    value = default if value is None else value
    if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < 2**31:
        raise ValueError(f"`{name}` must be a positive integer. Received: {name}={value!r}")
    return value


def _number(config, name, default):
    value = config.get(name, default)
    value = default if value is None else value
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value < math.inf:
        raise ValueError(f"`{name}` must be a positive number. Received: {name}={value!r}")
    return float(value)


def activation_name(backbone):
    """`"relu2"` or the name of a Keras activation of the gates."""
    activation = backbone.decoder_layers[0].feed_forward.activation
    return "relu2" if activation is relu_squared else activations.serialize(activation)


def check_architecture(backbone):
    """Refuses a backbone that is neither BitNet nor Llama.

    Raises:
        ValueError: It has a part that these architectures have not.
    """
    block = backbone.decoder_layers[0].feed_forward
    found = {
        "activation": (activation_name(backbone), ACTIVATIONS),
        "gated": (block.gated, (True,)),
        "sub_norm": (backbone.sub_norm, ("rms", None)),
        "use_bias": (backbone.use_bias, (False,)),
        "sliding_window": (backbone.sliding_window, (None,)),
    }
    for name, (value, accepted) in found.items():
        if value not in accepted:
            raise ValueError(
                f"A model for other programs must have `{name}` one of {accepted}. "
                f"Received: {name}={value!r}"
            )


def write_config(backbone, variant, dtype, tokenizer=None):
    """The `config.json` of a model.

    Args:
        backbone: `BitNetBackbone`.
        variant: `Variant`.
        dtype: `"float32"` or `"bfloat16"`.
        tokenizer: `Tokenizer` or `None`.
    """
    check_architecture(backbone)
    kind = BITNET if backbone.sub_norm else LLAMA
    rope = {"rope_type": "default", "rope_theta": backbone.rope_max_wavelength}
    if backbone.rope_scaling_factor != 1:
        rope.update(rope_type="linear", factor=backbone.rope_scaling_factor)
    config = {
        "architectures": ["BitNetForCausalLM" if kind == BITNET else "LlamaForCausalLM"],
        "model_type": kind,
        "vocab_size": backbone.vocabulary_size,
        "hidden_size": backbone.hidden_dim,
        "intermediate_size": backbone.intermediate_dim,
        "num_hidden_layers": backbone.num_layers,
        "num_attention_heads": backbone.num_query_heads,
        "num_key_value_heads": backbone.num_key_value_heads,
        "head_dim": backbone.head_dim,
        "hidden_act": activation_name(backbone),
        "max_position_embeddings": backbone.max_sequence_length,
        "rms_norm_eps": backbone.norm_epsilon,
        "rope_parameters": rope,
        "rope_theta": backbone.rope_max_wavelength,
        "attention_bias": False,
        "tie_word_embeddings": backbone.tie_word_embeddings,
        "dtype": dtype,
        "torch_dtype": dtype,
    }
    if variant.quantization_config is not None:
        config[QUANTIZATION] = dict(variant.quantization_config)
        if backbone.projection_norm is not None:
            config[QUANTIZATION].update(use_rms_norm=True, rms_norm_eps=backbone.norm_epsilon)
    if tokenizer is not None:
        config["bos_token_id"] = tokenizer.bos_token_id
        config["eos_token_id"] = next(iter(tokenizer.eos_token_ids), None)
        config["pad_token_id"] = tokenizer.pad_token_id
    return {key: value for key, value in config.items() if value is not None}
