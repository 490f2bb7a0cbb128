"""Models to ONNX files, packed products as ONNX Runtime's `MatMulNBits`.

The model is traced by PyTorch's exporter. Products leave a placeholder with the packed tiles in
the graph (`onnx_product.PLACEHOLDER`); their bytes are rearranged once it is traced.
"""

import keras

from keras_bitnet.checks import check_choice
from keras_bitnet.files import replacing
from keras_bitnet.interop.files import require
from keras_bitnet.kernels.select import use_kernel
from keras_bitnet.models import BitNetCausalLM

INLINE_BYTES = 2**31 - 2**24  # what one file of protocol buffers holds, less the graph
_SAMPLE = (2, 16)  # sizes of a free first axis and of others while tracing; 0 and 1 are special


def to_onnx(model, path, *, input_signature=None, accuracy_level=0):
    """Writes a model, packed or not, as an ONNX file that ONNX Runtime runs by itself.

    Packed products become the operator `MatMulNBits` (domain `com.microsoft`) of 2, 4 or 8 bits:
    binary and ternary weights take 2. Activations are quantized in the graph as the model does,
    and the sums over integers are exact, so outputs are those of the model:

        MatMulNBits([x_codes, 127], [levels, 0])

    One place in every block of inputs is a constant 127 with a weight of zero. ONNX Runtime rounds
    the activations of a block to 8 bits by their largest magnitude, 127; so it does not change
    them, and its fast integer kernels can run. It costs a share of `1 / block` of the file, or up
    to the size again where a scale is shared by few inputs.

    Takes `KERAS_BACKEND=torch`: a `.keras` file of any backend can be loaded there. A cache of keys
    and values is not part of the file; to generate text with another program, see `to_gguf`.

    Args:
        model: Keras model, float32. It is not changed.
        path: Path of the file. Weights of more than 2 GB go to `<path>.data` beside it.
        input_signature: Structure of `keras.InputSpec` (or tensors) as the model is called with
            it; axes of size `None` are free. By default the inputs of a Functional or Sequential
            model, or the tokens of a `BitNetCausalLM`.
        accuracy_level: Of products whose activations stay float. 0: computed in float32, fast for
            4 bits only. 4: ONNX Runtime rounds activations to 8 bits in blocks, and is fast.

    Raises:
        ValueError: The backend is not PyTorch, the inputs are not known, or the model is not
            float32.
        ImportError: The packages onnx and onnxscript are not installed (`keras-bitnet[onnx]`).

    Example:
    >>> packed = keras.models.load_model("packed.keras")  # KERAS_BACKEND=torch
    >>> keras_bitnet.interop.to_onnx(packed, "model.onnx")
    >>> session = onnxruntime.InferenceSession("model.onnx")

    Source:
        ONNX Runtime, contrib operators: com.microsoft.MatMulNBits.
    """
    check_choice("accuracy_level", accuracy_level, (0, 4))
    if keras.backend.backend() != "torch":
        raise ValueError(
            "ONNX files are traced by PyTorch. Load the model in a process with "
            "KERAS_BACKEND=torch (a .keras file loads on every backend) and export it there. "
            f"Received: the backend '{keras.backend.backend()}'"
        )
    require("onnxscript", "onnx")
    from keras_bitnet.interop import onnx_product

    _check_dtypes(model)
    signature = _signature(model) if input_signature is None else input_signature
    with use_kernel(onnx_product.kernel(accuracy_level)):
        program = _trace(model, signature, onnx_product.TRANSLATIONS)
    onnx_product.lower_products(program.model)
    _tidy(program.model)
    inline = sum(w.const_value.nbytes for w in program.model.graph.initializers.values())
    with replacing(path) as temporary:
        program.save(temporary, external_data=inline > INLINE_BYTES)


def _check_dtypes(model):
    for layer in model._flatten_layers():
        if layer.compute_dtype != "float32":
            raise ValueError(
                "A model for ONNX must compute in float32. Received: layer "
                f"'{layer.name}' of dtype policy '{layer.dtype_policy.name}'. Make the model with "
                "dtype='float32' and load its weights."
            )


def _signature(model):
    if isinstance(model, BitNetCausalLM):
        tokens = {"shape": (None, None), "dtype": "int32"}
        return {name: keras.InputSpec(**tokens) for name in ("token_ids", "padding_mask")}
    if isinstance(model, keras.Sequential) and model.built:
        return model.inputs[0]
    if isinstance(model, keras.Model) and hasattr(model, "_inputs_struct"):
        return model._inputs_struct
    raise ValueError(
        "The inputs of a subclassed model must be given as `input_signature`, for example "
        "`keras.InputSpec(shape=(None, 32), dtype='float32')`. Received: "
        f"input_signature=None for {type(model).__name__} '{model.name}'"
    )


def _trace(model, signature, translations):
    """The `torch.onnx.ONNXProgram` of a model."""
    import torch

    specs = keras.tree.flatten(signature)
    names = [_name(spec, i, signature) for i, spec in enumerate(specs)]
    samples, free = [], []
    for spec in specs:
        sizes = [_SAMPLE[min(axis, 1)] if n is None else n for axis, n in enumerate(spec.shape)]
        samples.append(keras.ops.ones(sizes, keras.backend.standardize_dtype(spec.dtype)))
        axes = [axis for axis, n in enumerate(spec.shape) if n is None]
        free.append(dict.fromkeys(axes, torch.export.Dim.DYNAMIC))

    class Flat(torch.nn.Module):
        """The model with its inputs in one list."""

        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, *flat):
            return self.model(keras.tree.pack_sequence_as(signature, flat), training=False)

    with torch.no_grad():
        return torch.onnx.export(
            Flat().eval(),
            tuple(samples),
            input_names=names,
            dynamic_shapes=(tuple(free),),
            custom_translation_table=translations,
            dynamo=True,
            verbose=False,
        )


def _name(spec, i, signature):
    if isinstance(signature, dict):
        return sorted(signature)[i]  # the order of `keras.tree`
    return getattr(spec, "name", None) or f"input_{i}"


def _tidy(graph_model):
    """Names the outputs, and drops the notes of the exporter: file paths and lines of source."""
    outputs = graph_model.graph.outputs
    for i, output in enumerate(outputs):
        output.name = "output" if len(outputs) == 1 else f"output_{i}"
    graph_model.metadata_props.clear()
    graph_model.graph.metadata_props.clear()
    for node in graph_model.graph.all_nodes():
        node.metadata_props.clear()
        for value in node.outputs:
            value.metadata_props.clear()
    for value in (*graph_model.graph.inputs, *graph_model.graph.initializers.values()):
        value.metadata_props.clear()
