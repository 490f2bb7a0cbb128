"""The shapes of published low-bit models, without their weights."""

from typing import Any

_LLAMA = {"activation": "silu", "sub_norm": None}

# Arguments of `BitNetBackbone`, each as its published `config.json` says.
PRESETS: dict[str, dict[str, Any]] = {
    "bitnet_b1_58_2b_4t": {
        "vocabulary_size": 128256,
        "num_layers": 30,
        "num_query_heads": 20,
        "num_key_value_heads": 5,
        "hidden_dim": 2560,
        "intermediate_dim": 6912,
    },
    "llama3_8b_1_58": {
        **_LLAMA,
        "vocabulary_size": 128256,
        "num_layers": 32,
        "num_query_heads": 32,
        "num_key_value_heads": 8,
        "hidden_dim": 4096,
        "intermediate_dim": 14336,
        "tie_word_embeddings": False,
        "max_sequence_length": 8192,
    },
    "smollm2_135m": {
        **_LLAMA,
        "vocabulary_size": 49152,
        "num_layers": 30,
        "num_query_heads": 9,
        "num_key_value_heads": 3,
        "hidden_dim": 576,
        "intermediate_dim": 1536,
        "rope_max_wavelength": 100000.0,
        "max_sequence_length": 8192,
    },
}


def preset(name):
    """The arguments of `BitNetBackbone` of a preset.

    Raises:
        ValueError: There is no preset of that name.
    """
    if name not in PRESETS:
        raise ValueError(f"Unknown preset. Accepted: {sorted(PRESETS)}. Received: {name!r}")
    return PRESETS[name]
