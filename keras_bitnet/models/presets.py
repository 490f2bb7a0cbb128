"""The shapes of published low-bit models, without their weights."""

import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True)
class BitNetConfig:
    """The architecture of a decoder: the arguments of `BitNetBackbone` of the same names.

    Attributes:
        vocabulary_size: Tokens.
        num_layers: Decoder blocks.
        num_query_heads: Query heads.
        num_key_value_heads: Key and value heads.
        hidden_dim: Size of the stream.
        intermediate_dim: Size inside the feed-forward blocks.
        head_dim: Size of a head, `hidden_dim / num_query_heads` by default.
        activation: Of the gate, `"relu2"` or an activation of Keras.
        sub_norm: `"rms"` before the last projection of each block, or `None`.
        norm_epsilon: Added to the variance in every norm.
        rope_max_wavelength: Base of the rotary embedding.
        tie_word_embeddings: Whether the logits use the table of the tokens.
        max_sequence_length: Longest sequence that the model was made for.
    """

    vocabulary_size: int
    num_layers: int
    num_query_heads: int
    num_key_value_heads: int
    hidden_dim: int
    intermediate_dim: int
    head_dim: int | None = None
    activation: str = "relu2"
    sub_norm: str | None = "rms"
    norm_epsilon: float = 1e-5
    rope_max_wavelength: float = 500000.0
    tie_word_embeddings: bool = True
    max_sequence_length: int = 4096

    def to_dict(self) -> dict[str, Any]:
        """The arguments for `BitNetBackbone`."""
        return dataclasses.asdict(self)


def _llama(**sizes):
    return BitNetConfig(activation="silu", sub_norm=None, **sizes)


# Each as its published `config.json` says.
PRESETS: dict[str, BitNetConfig] = {
    "bitnet_b1_58_2b_4t": BitNetConfig(
        vocabulary_size=128256,
        num_layers=30,
        num_query_heads=20,
        num_key_value_heads=5,
        hidden_dim=2560,
        intermediate_dim=6912,
    ),
    "llama3_8b_1_58": _llama(
        vocabulary_size=128256,
        num_layers=32,
        num_query_heads=32,
        num_key_value_heads=8,
        hidden_dim=4096,
        intermediate_dim=14336,
        tie_word_embeddings=False,
        max_sequence_length=8192,
    ),
    "smollm2_135m": _llama(
        vocabulary_size=49152,
        num_layers=30,
        num_query_heads=9,
        num_key_value_heads=3,
        hidden_dim=576,
        intermediate_dim=1536,
        rope_max_wavelength=100000.0,
        max_sequence_length=8192,
    ),
}


def preset(name):
    """The `BitNetConfig` of a preset.

    Raises:
        ValueError: There is no preset of that name.
    """
    if name not in PRESETS:
        raise ValueError(f"Unknown preset. Accepted: {sorted(PRESETS)}. Received: {name!r}")
    return PRESETS[name]
