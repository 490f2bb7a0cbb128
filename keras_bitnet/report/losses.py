"""The loss of a model on arrays of outputs, for measuring rather than training."""

import keras
from keras import ops


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
        return lambda y, outputs: float(
            ops.mean(function(ops.convert_to_tensor(y), ops.convert_to_tensor(outputs[0])))
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
        return float(model.compute_loss(y=y, y_pred=y_pred, training=False))

    return compiled
