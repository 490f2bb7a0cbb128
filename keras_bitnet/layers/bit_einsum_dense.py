"""BitEinsumDense: a low-bit product along any axes, written as an einsum equation."""

import dataclasses
import math
import re
import string

import keras
from keras import ops

from keras_bitnet.layers.base import BitLayer


@keras.saving.register_keras_serializable("keras_bitnet")
class BitEinsumDense(BitLayer):
    """`keras.layers.EinsumDense` with a low-bit kernel and quantized inputs.

        y = activation(einsum(equation, quantize(x), quantize(kernel)) + bias)

    The axes that the kernel sums over are one token to the activation quantizer and the inputs
    of the kernel as a matrix; the axes that it adds are its outputs.

    Args:
        equation: Einsum equation such as `"abc,cde->abde"` or `"...x,xy->...y"`.
        output_shape: Shape of the output without the batch axis (and without the axes of an
            ellipsis); `None` for unknown sizes. An integer for a single axis.
        activation: Activation function, none by default.
        bias_axes: Output axes of the kernel that get a bias, such as `"de"`, or `None`.
        kernel_initializer, bias_initializer: Initializers of the weights.
        kernel_regularizer, bias_regularizer: Regularizers.
        kernel_constraint, bias_constraint: Constraints.
        lora_rank, lora_alpha: Low-rank adaptation, see `enable_lora`.
        weight_quantizer, activation_quantizer, norm, norm_position, norm_epsilon,
            quantization_strength, packed: See `keras_bitnet.layers.BitLayer`.
        **kwargs: `name`, `dtype`, `trainable` of any Keras layer.

    Raises:
        ValueError: The equation is not a product of inputs and kernel: an axis of the kernel
            is in inputs and output at once, or in neither, or an input axis is summed alone.

    Source:
        The layer is that of Keras; the quantization that of `BitLinear`.
    """

    def __init__(
        self,
        equation,
        output_shape,
        activation=None,
        bias_axes=None,
        kernel_initializer="glorot_uniform",
        bias_initializer="zeros",
        kernel_regularizer=None,
        bias_regularizer=None,
        kernel_constraint=None,
        bias_constraint=None,
        lora_rank=None,
        lora_alpha=None,
        **kwargs,
    ):
        super().__init__(
            activation=activation,
            kernel_initializer=kernel_initializer,
            bias_initializer=bias_initializer,
            kernel_regularizer=kernel_regularizer,
            bias_regularizer=bias_regularizer,
            kernel_constraint=kernel_constraint,
            bias_constraint=bias_constraint,
            lora_rank=lora_rank,
            lora_alpha=lora_alpha,
            **kwargs,
        )
        self.equation = equation
        sizes = (output_shape,) if isinstance(output_shape, int) else tuple(output_shape)
        self.partial_output_shape = sizes
        self.bias_axes = bias_axes
        self._axes(rank=None)  # checks the equation

    def build(self, input_shape):
        """Creates the weights for inputs of this shape."""
        axes = self._axes(len(input_shape))
        sizes = axes.sizes(input_shape, self.partial_output_shape, self.equation)
        # Tuples: of lists Keras makes its own, which `torch.compile` does not take for shapes.
        self._summed_shape = tuple(sizes[a] for a in axes.summed)
        self._added_shape = tuple(sizes[a] for a in axes.added)
        if None in self._summed_shape + self._added_shape:
            raise ValueError(
                f"The axes of the kernel of '{self.equation}' must be known. Received: "
                f"input_shape={tuple(input_shape)}, output_shape={self.partial_output_shape}"
            )
        self._kernel_order = tuple(axes.kernel.index(a) for a in axes.summed + axes.added)
        self.build_kernel(
            math.prod(self._summed_shape),
            math.prod(self._added_shape),
            kernel_shape=[sizes[a] for a in axes.kernel],
        )
        if self.bias_axes is not None:
            self.build_bias(axes.bias_shape(self.bias_axes, sizes, self.equation))
        if self.lora_rank:
            self.enable_lora(self.lora_rank, self.lora_alpha)

    def call(self, inputs):
        """Computes the einsum; see the class."""
        axes = self._axes(len(inputs.shape))
        kept = [axes.inputs.index(a) for a in axes.kept]
        shape = ops.shape(inputs)
        leading = [shape[i] for i in kept]
        x = _transposed(self.floating(inputs), kept + [axes.inputs.index(a) for a in axes.summed])
        if len(self._summed_shape) > 1:
            x = ops.reshape(x, (*leading, self.in_features))
        y = self.product(x)
        if len(self._added_shape) > 1:
            y = ops.reshape(y, (*leading, *self._added_shape))
        y = _transposed(y, [(axes.kept + axes.added).index(a) for a in axes.output])
        return y if self.activation is None else self.activation(y)

    def _initial_kernel(self, shape, dtype=None):
        """Drawn as a matrix, so that fan-in and fan-out are those of the product."""
        matrix = self.kernel_initializer((self.in_features, self.out_features), dtype=dtype)
        return self.matrix_to_kernel(matrix)

    def kernel_to_matrix(self, kernel):
        """Sums first, additions last, each side flattened."""
        kernel = ops.transpose(kernel, self._kernel_order)
        return ops.reshape(kernel, (self.in_features, self.out_features))

    def matrix_to_kernel(self, matrix):
        """The inverse of `kernel_to_matrix`."""
        kernel = ops.reshape(matrix, self._summed_shape + self._added_shape)
        inverse = sorted(range(len(self._kernel_order)), key=self._kernel_order.__getitem__)
        return ops.transpose(kernel, inverse)

    def row_bias(self):
        """The bias, of any of the added axes, as a vector `(out_features,)`, or `None`."""
        if self.bias is None:
            return None
        axes = self._axes(rank=None)
        present = [a for a in axes.output if a in self.bias_axes]
        bias = ops.reshape(self.bias, [self._added_shape[axes.added.index(a)] for a in present])
        bias = ops.transpose(bias, [present.index(a) for a in axes.added if a in present])
        absent = [i for i, a in enumerate(axes.added) if a not in present]
        bias = ops.broadcast_to(ops.expand_dims(bias, absent), self._added_shape)
        return ops.reshape(bias, (self.out_features,))

    def _axes(self, rank):
        return _Axes.parse(self.equation, rank)

    def compute_output_shape(self, input_shape):
        """Input axes that are kept, kernel axes that are added, in the order of the equation."""
        axes = self._axes(len(input_shape))
        sizes = axes.sizes(input_shape, self.partial_output_shape, self.equation)
        return tuple(sizes[a] for a in axes.output)

    def get_config(self):
        """The arguments of the constructor."""
        return {
            **super().get_config(),
            "equation": self.equation,
            "output_shape": self.partial_output_shape,
            "bias_axes": self.bias_axes,
        }


def _transposed(x, order):
    return x if order == sorted(order) else ops.transpose(x, order)


@dataclasses.dataclass(frozen=True)
class _Axes:
    """The axes of an equation, one letter each, an ellipsis written out."""

    inputs: list[str]
    kernel: list[str]
    output: list[str]
    given: list[str]  # the output axes that `output_shape` gives

    @classmethod
    def parse(cls, equation, rank):
        match = re.fullmatch(r"(\.{3})?(\w+)(\.{3})?,(\w+)->(\.{3})?(\w+)(\.{3})?", equation)
        if not match or match[1] != match[5] or match[3] != match[7] or (match[1] and match[3]):
            raise ValueError(
                "`equation` must look like 'ab,bc->ac', '...b,bc->...c' or 'ab...,bc->ac...'. "
                f"Received: equation={equation!r}"
            )
        left, inputs, right, kernel, _, output, _ = match.groups()
        unused = [a for a in string.ascii_letters if a not in equation]
        hidden = unused[: max(0, rank - len(inputs))] if rank and (left or right) else []
        given = list(output) if left else list(output[1:])
        before, after = (hidden, []) if left else ([], hidden)
        axes = cls([*before, *inputs, *after], list(kernel), [*before, *output, *after], given)
        axes._check(equation, rank)
        return axes

    @property
    def summed(self):
        return [a for a in self.kernel if a in self.inputs]

    @property
    def added(self):
        return [a for a in self.kernel if a not in self.inputs]

    @property
    def kept(self):
        return [a for a in self.inputs if a not in self.kernel]

    def _check(self, equation, rank):
        repeated = any(len(set(s)) < len(s) for s in (self.inputs, self.kernel, self.output))
        shared = [a for a in self.summed if a in self.output]
        if repeated or shared or not self.summed or set(self.output) != {*self.kept, *self.added}:
            raise ValueError(
                "`equation` must be a plain product: every axis of the kernel is either in the "
                "inputs or in the output, and every other input axis is in the output. "
                f"Received: equation={equation!r}"
            )
        if rank is not None and rank != len(self.inputs):
            raise ValueError(
                f"The equation '{equation}' takes inputs of rank {len(self.inputs)}. "
                f"Received: inputs of rank {rank}"
            )

    def sizes(self, input_shape, output_shape, equation):
        if len(output_shape) != len(self.given):
            raise ValueError(
                f"`output_shape` must give the sizes of the axes {self.given} of '{equation}'. "
                f"Received: output_shape={output_shape}"
            )
        sizes = dict(zip(self.given, output_shape, strict=True))
        for axis, size in zip(self.inputs, input_shape, strict=True):
            if size is not None and sizes.get(axis) not in (None, size):
                raise ValueError(
                    f"Axis '{axis}' of '{equation}' has size {size} in the inputs and "
                    f"{sizes[axis]} in the output. Received: input_shape={tuple(input_shape)}, "
                    f"output_shape={output_shape}"
                )
            sizes[axis] = sizes.get(axis) if size is None else size
        return sizes

    def bias_shape(self, bias_axes, sizes, equation):
        if not bias_axes or any(a not in self.added for a in bias_axes):
            raise ValueError(
                f"`bias_axes` must name axes that the kernel of '{equation}' adds: "
                f"{self.added}. Received: bias_axes={bias_axes!r}"
            )
        first = min(self.output.index(a) for a in bias_axes)
        return [sizes[a] if a in bias_axes else 1 for a in self.output[first:]]
