"""The loss of a model on arrays of outputs, for measuring rather than training."""

import keras
from keras import ops

from keras_bitnet.report.data import short_message


def loss_function(model, loss, examples):
    """Returns `loss(y, outputs) -> float` for lists of output arrays.

    Args:
        model: The model whose outputs they are.
        loss: A Keras loss or its name, or `None`: that of the compiled model.
        examples: List of `(x, y)`.

    Returns:
        The function, or `None` where there are no targets or no loss.
    """
    if any(y is None for _, y in examples):
        return None
    if loss is not None:
        function = keras.losses.get(loss)
        return _checked(
            lambda y, outputs: ops.mean(
                function(ops.convert_to_tensor(y), ops.convert_to_tensor(outputs[0]))
            )
        )
    if not getattr(model, "compiled", False):
        return None
    structure = getattr(model, "output", None)

    def compiled(y, outputs):
        tensors = [ops.convert_to_tensor(output) for output in outputs]
        y_pred = (
            tensors[0] if structure is None else keras.tree.pack_sequence_as(structure, tensors)
        )
        y = keras.tree.map_structure(ops.convert_to_tensor, y)
        return model.compute_loss(y=y, y_pred=y_pred, training=False)

    return _checked(compiled)


def _checked(loss):
    """The loss as a float, or a `ValueError` that names what does not fit."""

    def checked(y, outputs):
        try:
            return float(loss(y, outputs))
        except Exception as error:  # whatever a loss raises on what it was not made for
            shapes = [tuple(leaf.shape) for leaf in keras.tree.flatten(y)]
            raise ValueError(
                "The loss cannot be computed from the targets in `data`: "
                f"{short_message(error)}. Received: targets of shapes {shapes}, outputs "
                f"of shapes {[output.shape for output in outputs]}"
            ) from error

    return checked
