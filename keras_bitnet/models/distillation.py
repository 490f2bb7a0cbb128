"""Distillation of a float decoder into a low-bit one: its logits and its attention."""

import keras
import numpy as np
from keras import ops

from keras_bitnet.checks import check_number
from keras_bitnet.models.backbone import tokens_and_mask
from keras_bitnet.models.causal_lm import BitNetCausalLM


@keras.saving.register_keras_serializable("keras_bitnet")
class BitDistiller(keras.Model):
    """Trains a low-bit student on targets and, at once, to imitate a float teacher.

        loss = loss of compile(targets, logits)
             + logits_weight * temperature^2 * KL(softmax(teacher / temperature) || student)
             + attention_weight * mean over a in {queries, keys, values} of KL(teacher || student)
               of the attention relations softmax(a a^T / sqrt(size))

    Compile it, fit it, then take `distiller.student`. Outside of training it computes the logits
    of the student, so `evaluate` and `validation_data` measure the student alone. Callbacks of
    `keras_bitnet.callbacks` act on the layers of the student only.

    Args:
        student: `BitNetCausalLM` that is trained, such as `convert_to_bitnet` gives.
        teacher: `BitNetCausalLM` of the same vocabulary. It is frozen: `trainable` becomes False.
        logits_weight: Weight of the divergence of the logits; 0 leaves it out.
        temperature: Above 1 flattens both distributions, so that unlikely tokens count more.
        attention_weight: Weight of the divergence of the attention relations; 0 leaves it out.
        attention_layer: Index of the block whose relations are compared, in both models.
        relation_heads: Heads of the relations: queries, keys and values are split anew, so the
            models may differ in heads and sizes. By default the student's key-value heads.
        **kwargs: `name`, `trainable` of any Keras model.

    Call arguments:
        inputs: `{"token_ids", "padding_mask"}`, see `BitNetBackbone`. Padding takes no part in
            the distillation; leave it out of the loss of `compile` with `sample_weight`.

    Raises:
        ValueError: An argument is out of range, or the models do not fit together.

    Source:
        Wu et al. 2025, BitNet Distillation (https://arxiv.org/abs/2510.13998), and for the
        relations Wang et al. 2020, MiniLMv2 (https://arxiv.org/abs/2012.15828). Here queries and
        keys are those that the rotary embedding has turned, and the means are over tokens, so
        the weights are not those of the papers.
    """

    def __init__(
        self,
        student,
        teacher,
        logits_weight=1.0,
        temperature=1.0,
        attention_weight=1.0,
        attention_layer=-1,
        relation_heads=None,
        **kwargs,
    ):
        super().__init__(**kwargs)
        _check_models(student, teacher, attention_layer)
        check_number("logits_weight", logits_weight, "[0, inf)")
        check_number("temperature", temperature, "(0, inf)")
        check_number("attention_weight", attention_weight, "[0, inf)")
        self.student = student
        self.teacher = teacher
        self.teacher.trainable = False
        self.logits_weight = logits_weight
        self.temperature = temperature
        self.attention_weight = attention_weight
        self.attention_layer = attention_layer
        self.relation_heads = relation_heads or student.backbone.num_key_value_heads
        _check_heads(self.relation_heads, student.backbone, teacher.backbone)
        self.built = True

    def build(self, input_shape=None):
        """Nothing to do: the weights are those of student and teacher."""

    def call(self, inputs, training=None):
        """The logits of the student; in training adds the losses of the distillation."""
        if not training:
            return self.student(inputs, training=False)
        logits, relations = self._run(self.student, inputs, training)
        wanted, teacher_relations = self._run(self.teacher, inputs, False)
        _, mask = tokens_and_mask(inputs)
        mask = ops.ones(ops.shape(logits)[:2]) if mask is None else ops.cast(mask, "float32")
        if self.logits_weight:
            pair = (ops.cast(x, "float32") / self.temperature for x in (wanted, logits))
            loss = _masked_mean(_divergence(*pair), mask) * self.temperature**2
            self.add_loss(self.logits_weight * loss)
        if self.attention_weight:
            rows = [
                ops.mean(_divergence(*pair), axis=1)
                for pair in zip(
                    *(self._scores(r, mask) for r in (teacher_relations, relations)), strict=True
                )
            ]
            loss = _masked_mean(sum(rows) / len(rows), mask)
            self.add_loss(self.attention_weight * loss)
        return logits

    def _run(self, model, inputs, training):
        """Logits, and queries, keys and values of a block where they are compared."""
        if not self.attention_weight:
            return model(inputs, training=training), None
        hidden, attention = model.backbone(
            inputs, training=training, attention_layer=self.attention_layer
        )
        return model.backbone.logits(hidden), attention

    def _scores(self, attention, mask):
        """`a a^T / sqrt(size)`, padding masked, `(batch, heads, length, length)` for each a."""
        for x in attention:
            batch, length = ops.shape(x)[:2]
            size = x.shape[2] * x.shape[3] // self.relation_heads
            x = ops.reshape(ops.cast(x, "float32"), (batch, length, self.relation_heads, size))
            x = ops.transpose(x, (0, 2, 1, 3))
            scores = ops.matmul(x, ops.transpose(x, (0, 1, 3, 2))) * np.float32(size**-0.5)
            yield ops.where(mask[:, None, None] > 0, scores, np.float32(-1e9))

    def get_config(self):
        """The arguments of the constructor."""
        return {
            **super().get_config(),
            "student": keras.saving.serialize_keras_object(self.student),
            "teacher": keras.saving.serialize_keras_object(self.teacher),
            "logits_weight": self.logits_weight,
            "temperature": self.temperature,
            "attention_weight": self.attention_weight,
            "attention_layer": self.attention_layer,
            "relation_heads": self.relation_heads,
        }

    @classmethod
    def from_config(cls, config):
        """The distiller that `get_config` describes."""
        models = {
            name: keras.saving.deserialize_keras_object(config[name])
            for name in ("student", "teacher")
        }
        return cls(**{**config, **models})


def _divergence(wanted, logits):
    """Kullback-Leibler divergence of softmaxes over the last axis, no gradient to `wanted`."""
    wanted = ops.log_softmax(ops.stop_gradient(wanted), axis=-1)
    return ops.sum(ops.exp(wanted) * (wanted - ops.log_softmax(logits, axis=-1)), axis=-1)


def _masked_mean(values, mask):
    return ops.sum(values * mask) / ops.maximum(ops.sum(mask), 1.0)


def _check_models(student, teacher, attention_layer):
    for name, model in (("student", student), ("teacher", teacher)):
        if not isinstance(model, BitNetCausalLM):
            raise ValueError(
                f"`{name}` must be a `BitNetCausalLM`. Received: {type(model).__name__}"
            )
        layers = model.backbone.num_layers
        if not isinstance(attention_layer, int) or not -layers <= attention_layer < layers:
            raise ValueError(
                f"`attention_layer` must be the index of one of the {layers} blocks of the "
                f"{name}. Received: attention_layer={attention_layer!r}"
            )
    if student is teacher or student.packed:
        raise ValueError(
            "The student must be another model than the teacher, and not packed. Received: "
            f"{'the same model twice' if student is teacher else 'a packed student'}"
        )
    sizes = [model.backbone.vocabulary_size for model in (student, teacher)]
    if sizes[0] != sizes[1]:
        raise ValueError(
            "Student and teacher must have the same vocabulary. "
            f"Received: sizes {sizes[0]} and {sizes[1]}"
        )


def _check_heads(relation_heads, *backbones):
    for backbone in backbones:
        heads = (backbone.num_query_heads, backbone.num_key_value_heads)
        if any(h * backbone.head_dim % relation_heads for h in heads):
            raise ValueError(
                "`relation_heads` must divide the size of all queries and of all keys of both "
                f"models. Received: relation_heads={relation_heads}, {heads[0]} and {heads[1]} "
                f"heads of {backbone.head_dim}"
            )
