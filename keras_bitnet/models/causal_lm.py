"""BitNetCausalLM: a decoder that predicts the next token, trains with `fit` and generates."""

import keras

from keras_bitnet.layers.block import PacksAsWhole
from keras_bitnet.models.backbone import BitNetBackbone
from keras_bitnet.models.generation import Generation


@keras.saving.register_keras_serializable("keras_bitnet")
class BitNetCausalLM(PacksAsWhole, Generation):
    """Language model on a `BitNetBackbone`.

    Args:
        backbone: A `BitNetBackbone`.
        tokenizer: For prompts of text: an object with `encode(text)`, which gives token ids or
            has them as `ids`, and `decode(ids)`; and `stop_tokens`, ids, if it has any. It is
            not saved with the model and may be set at any time.
        **kwargs: `name`, `trainable` of any Keras model.

    Call arguments:
        inputs: `{"token_ids", "padding_mask"}`, see `BitNetBackbone`.

    Returns:
        Logits `(batch, length, vocabulary_size)`.

    Raises:
        ValueError: `backbone` is no `BitNetBackbone`.

    Example:
    >>> model = BitNetCausalLM.from_preset("bitnet_b1_58_2b_4t", packed=True)
    >>> model.generate([[1, 2, 3]], max_length=8)
    """

    def __init__(self, backbone, tokenizer=None, **kwargs):
        kwargs.setdefault("dtype", backbone.dtype_policy)
        super().__init__(**kwargs)
        if not isinstance(backbone, BitNetBackbone):
            raise ValueError(
                f"`backbone` must be a `BitNetBackbone`. Received: {type(backbone).__name__}"
            )
        self.backbone = backbone
        self.tokenizer = tokenizer
        self.built = True

    def build(self, input_shape=None):
        """Nothing to do: the weights are those of the backbone."""

    @property
    def packed(self):  # type: ignore[override]
        """Whether the kernels are packed."""
        return self.backbone.packed

    @property
    def weight_quantizer(self):
        """That of the projections."""
        return self.backbone.weight_quantizer

    def call(self, inputs, training=None):
        """Maps tokens to logits; see the class."""
        return self.backbone.logits(self.backbone(inputs, training=training))

    def remade(self, **changes):
        """A copy with some arguments of the backbone changed, weights not copied."""
        config = self.get_config()
        config["backbone"] = self.backbone.remade(**changes)
        return type(self)(tokenizer=self.tokenizer, **config)

    @classmethod
    def from_preset(cls, name, **arguments):
        """The model of a preset with random weights; see `BitNetBackbone.from_preset`."""
        return cls(BitNetBackbone.from_preset(name, **arguments))

    @classmethod
    def from_config(cls, config):
        """The model that `get_config` describes."""
        config = dict(config)
        config["backbone"] = keras.saving.deserialize_keras_object(config["backbone"])
        return cls(**config)

    def get_config(self):
        """The arguments of the constructor."""
        return {
            **super().get_config(),
            "backbone": keras.saving.serialize_keras_object(self.backbone),
        }
