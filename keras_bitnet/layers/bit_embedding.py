"""Embeddings with low-bit rows: one packed table serves the lookup and the reverse product."""

from typing import ClassVar

import keras
from keras import ops

from keras_bitnet.checks import check_count
from keras_bitnet.layers.base import BitLayer
from keras_bitnet.layers.bit_linear import BitLinear
from keras_bitnet.layers.block import BitBlock
from keras_bitnet.layers.inputs import UNTREATED
from keras_bitnet.layers.kernel_weights import assign_copy
from keras_bitnet.layers.shared_arguments import under_own_names


class _ComputesTable:
    """Mixin of layers whose `embeddings` are computed, at a cost.

    `dir` does not name them: Keras reads whatever it names to save and to load a layer.
    """

    def __dir__(self):
        return [name for name in super().__dir__() if name != "embeddings"]


@keras.saving.register_keras_serializable("keras_bitnet")
class BitEmbedding(_ComputesTable, BitLayer):
    """`keras.layers.Embedding` with low-bit vectors.

        y[i] = quantize(kernel)[inputs[i]]

    A token is an output of the kernel as a matrix `(output_dim, input_dim)`, so
    `granularity="channel"` is a scale for each token. Packed, the bytes of the tokens asked for
    are gathered and unpacked, not the table: `output_dim * bits / 8` bytes a token. The same
    bytes serve `product`, which maps vectors to scores of the tokens.

    Args:
        input_dim: Positive integer, number of tokens.
        output_dim: Positive integer, size of a vector.
        embeddings_initializer: Initializer of the `(input_dim, output_dim)` table.
        embeddings_regularizer, activity_regularizer: Regularizers.
        embeddings_constraint: Constraint.
        mask_zero: Whether token 0 is padding that is masked out.
        weights: Array `(input_dim, output_dim)` to start from, or `None`.
        lora_rank, lora_alpha: Low-rank adaptation, see `enable_lora`.
        weight_quantizer, quantization_strength, packed: See `keras_bitnet.layers.BitLayer`.
        activation_quantizer: Of the vectors that `product` takes; `None` by default, since a
            lookup has none.
        **kwargs: `name`, `dtype`, `trainable` of any Keras layer.

    Input shape:
        Integers `(batch, ...)` in `[0, input_dim)`.

    Output shape:
        `(batch, ..., output_dim)`.

    Raises:
        ValueError: An argument is out of range; the message says what is accepted.

    Source:
        The layer is that of Keras; the quantization that of `BitLinear`.
    """

    own_names: ClassVar = {
        "kernel_initializer": "embeddings_initializer",
        "kernel_regularizer": "embeddings_regularizer",
        "kernel_constraint": "embeddings_constraint",
        **dict.fromkeys(("bias_initializer", "bias_regularizer", "bias_constraint")),
        **dict.fromkeys(("norm", "norm_position", "norm_epsilon", "activation")),
        **UNTREATED,
    }
    not_in_spec = frozenset({"activation_quantizer"})  # a lookup has no use for it
    takes_static = False  # many are only looked up, so that calibration sees no vectors

    def __init__(
        self,
        input_dim,
        output_dim,
        embeddings_initializer="uniform",
        embeddings_regularizer=None,
        embeddings_constraint=None,
        mask_zero=False,
        weights=None,
        lora_rank=None,
        lora_alpha=None,
        activation_quantizer=None,
        **kwargs,
    ):
        check_count("input_dim", input_dim)
        check_count("output_dim", output_dim)
        super().__init__(
            kernel_initializer=embeddings_initializer,
            kernel_regularizer=embeddings_regularizer,
            kernel_constraint=embeddings_constraint,
            lora_rank=lora_rank,
            lora_alpha=lora_alpha,
            activation_quantizer=activation_quantizer,
            **kwargs,
        )
        self.input_dim = input_dim
        self.output_dim = output_dim
        self.mask_zero = mask_zero
        self.supports_masking = mask_zero
        self.autocast = False  # tokens given as float32 would lose digits
        if weights is not None:
            self.build(None)
            self.kernel.assign(weights[0] if isinstance(weights, list) else weights)
            self.reset_scale()

    def build(self, input_shape=None):
        """Creates the table; the shape of the inputs does not matter."""
        table = (self.input_dim, self.output_dim)
        self.build_kernel(self.output_dim, self.input_dim, kernel_shape=table)
        if self.lora_rank:
            self.enable_lora(self.lora_rank, self.lora_alpha)

    def kernel_to_matrix(self, kernel):
        """Tokens become columns."""
        return ops.transpose(kernel)

    matrix_to_kernel = kernel_to_matrix

    def call(self, inputs):
        """Maps tokens `(batch, ...)` to vectors `(batch, ..., output_dim)`."""
        tokens = ops.convert_to_tensor(inputs)
        if keras.backend.standardize_dtype(tokens.dtype) not in ("int32", "int64"):
            tokens = ops.cast(tokens, "int32")  # TensorFlow takes no bytes for indices
        if self.packed:
            y = self.packed_kernel.gather(tokens)
        else:
            y = ops.take(ops.transpose(self.matrix_in_use()), tokens, axis=0)
        if self.lora_enabled:
            low_rank = ops.take(ops.transpose(self.lora_kernel_b), tokens, axis=0)
            low_rank = ops.matmul(low_rank, ops.transpose(self.lora_kernel_a))
            y = y + low_rank * (self.lora_alpha / self.lora_rank)
        return ops.cast(y, self.compute_dtype)

    @property
    def embeddings(self):
        """The table `(input_dim, output_dim)` of all vectors that `call` gives, as in Keras.

        A tensor, `float32`, LoRA added: for layers that read the table of another. Packed, it is
        unpacked whole.
        """
        table = ops.transpose(self.matrix_in_use())
        if self.lora_enabled:
            low_rank = ops.transpose(ops.matmul(self.lora_kernel_a, self.lora_kernel_b))
            table = table + low_rank * (self.lora_alpha / self.lora_rank)
        return table

    def compute_mask(self, inputs, mask=None):
        """Where the token is not 0, with `mask_zero`."""
        return ops.not_equal(inputs, 0) if self.mask_zero else None

    def compute_output_shape(self, input_shape):
        """`(batch, ..., output_dim)`."""
        return (*input_shape, self.output_dim)

    def take_weights(self, layer):
        """Copies the table of a `keras.layers.Embedding`, LoRA merged."""
        assign_copy(self.kernel, layer.embeddings)
        self.reset_scale()
        self.mark_untrained()

    def get_config(self):
        """The arguments of the constructor."""
        return {
            **super().get_config(),
            "input_dim": self.input_dim,
            "output_dim": self.output_dim,
            "mask_zero": self.mask_zero,
        }


@keras.saving.register_keras_serializable("keras_bitnet")
class ReversibleBitEmbedding(_ComputesTable, BitBlock):
    """`keras.layers.ReversibleEmbedding` with low-bit vectors: tokens to vectors and back.

        y = embedding[tokens],   logits = quantize(vectors) @ transpose(embedding)

    Tied, lookup and product read one packed table.

    Args:
        input_dim: Positive integer, number of tokens.
        output_dim: Positive integer, size of a vector.
        tie_weights: Whether the way back uses the table of the lookup, or a kernel of its own.
        embeddings_initializer, embeddings_regularizer, embeddings_constraint: Of the table, or
            of both tables.
        mask_zero: Whether token 0 is padding that is masked out.
        reverse_dtype: Dtype of the way back, the compute dtype by default.
        logit_soft_cap: `None`, or `c`: the logits become `c * tanh(logits / c)`.
        weight_quantizer, activation_quantizer, quantization_strength: See
            `keras_bitnet.layers.BitLayer`.
        **kwargs: `name`, `dtype`, `trainable` of any Keras layer.

    Call arguments:
        inputs: Tokens `(batch, ...)`, or vectors `(batch, ..., output_dim)`.
        reverse: Whether to map vectors to logits `(batch, ..., input_dim)`.

    Source:
        Press and Wolf 2016 (https://arxiv.org/abs/1608.05859), tied embeddings.
    """

    own_names: ClassVar = {**BitEmbedding.own_names, "projection_norm": None}

    def __init__(
        self,
        input_dim,
        output_dim,
        tie_weights=True,
        embeddings_initializer="uniform",
        embeddings_regularizer=None,
        embeddings_constraint=None,
        mask_zero=False,
        reverse_dtype=None,
        logit_soft_cap=None,
        **kwargs,
    ):
        super().__init__(
            kernel_initializer=embeddings_initializer,
            kernel_regularizer=embeddings_regularizer,
            kernel_constraint=embeddings_constraint,
            **kwargs,
        )
        self.autocast = False
        self.tie_weights = tie_weights
        self.reverse_dtype = reverse_dtype
        self.logit_soft_cap = logit_soft_cap
        inner = under_own_names(BitEmbedding, self.layer_arguments())
        self.embedding = BitEmbedding(
            input_dim, output_dim, mask_zero=mask_zero, name="embedding", **inner
        )
        self.supports_masking = mask_zero
        if not tie_weights:
            self.reverse_projection = BitLinear(
                input_dim, use_bias=False, name="reverse_projection", **self.layer_arguments()
            )

    @property
    def mask_zero(self):
        """Whether token 0 is masked out; the layers of KerasHub around this one ask."""
        return self.embedding.mask_zero

    @property
    def embeddings(self):
        """The table of the lookup, see `BitEmbedding.embeddings`."""
        return self.embedding.embeddings

    def build(self, input_shape=None):
        """Creates the table or tables; the shape of the inputs does not matter."""
        self.embedding.build(None)
        if not self.tie_weights:
            self.reverse_projection.build((None, self.embedding.output_dim))

    def call(self, inputs, reverse=False):
        """Maps tokens to vectors, or vectors to logits; see the class."""
        if not reverse:
            return self.embedding(inputs)
        table = self.embedding if self.tie_weights else self.reverse_projection
        logits = table.product(ops.cast(inputs, self.reverse_dtype or self.compute_dtype))
        if self.logit_soft_cap is not None:
            logits = ops.tanh(logits / self.logit_soft_cap) * self.logit_soft_cap
        return logits

    def compute_mask(self, inputs, mask=None):
        """That of the lookup; the way back has none."""
        if keras.backend.is_int_dtype(inputs.dtype):
            return self.embedding.compute_mask(inputs)
        return None

    def compute_output_spec(self, inputs, reverse=False):
        """Vectors or logits, see `call`."""
        if not reverse:
            return self.embedding.compute_output_spec(inputs)
        dtype = self.reverse_dtype or self.compute_dtype
        return keras.KerasTensor(self.compute_output_shape(inputs.shape, True), dtype=dtype)

    def compute_output_shape(self, input_shape, reverse=False):
        """`(batch, ..., output_dim)`, or `(batch, ..., input_dim)` in reverse."""
        if reverse:
            return (*input_shape[:-1], self.embedding.input_dim)
        return self.embedding.compute_output_shape(input_shape)

    def take_weights(self, layer):
        """Copies the weights of a `keras.layers.ReversibleEmbedding`, LoRA merged."""
        self.embedding.take_weights(layer)
        if not self.tie_weights:
            self.reverse_projection.take_kernel(layer.reverse_embeddings)
            self.reverse_projection.mark_untrained()

    def get_config(self):
        """The arguments of the constructor."""
        return {
            **super().get_config(),
            "input_dim": self.embedding.input_dim,
            "output_dim": self.embedding.output_dim,
            "mask_zero": self.embedding.mask_zero,
            "tie_weights": self.tie_weights,
            "reverse_dtype": self.reverse_dtype,
            "logit_soft_cap": self.logit_soft_cap,
        }
