"""Backbones of KerasHub: converted, fine-tuned, packed, saved, loaded in another process."""

import json

import keras
import numpy as np
import pytest
from helpers import BACKEND, bit_layers, mean_error, needs, run_python, to_numpy

import keras_bitnet

pytestmark = needs("keras_hub")

# Where the files are loaded, and how far outputs may be; one other backend stands for all pairs.
READERS = {BACKEND: 1e-6, **({"tensorflow": 1e-2} if BACKEND == "torch" else {})}
RNG = np.random.default_rng(1)
TOKENS = {
    "token_ids": RNG.integers(0, 23, (4, 6)).astype("int32"),
    "padding_mask": np.array([[1] * 6, [1] * 6, [1] * 4 + [0] * 2, [1] * 6], "int32"),
}
IMAGES = RNG.uniform(size=(4, 8, 8, 3)).astype("float32")
SMALL = {"num_layers": 1, "hidden_dim": 16}


def gpt2():
    from keras_hub import models

    return models.GPT2Backbone(
        vocabulary_size=23, num_heads=2, intermediate_dim=32, max_sequence_length=6, **SMALL
    )


def gemma():
    from keras_hub import models

    return models.GemmaBackbone(
        vocabulary_size=23, num_query_heads=4, num_key_value_heads=2, head_dim=8,
        intermediate_dim=32, **SMALL,
    )  # fmt: skip


def vit():
    from keras_hub import models

    return models.ViTBackbone((8, 8, 3), patch_size=4, num_heads=2, mlp_dim=32, **SMALL)


# A backbone -> its inputs, and the quantized layers in it.
BACKBONES = {gpt2: (TOKENS, 1 + 6), gemma: (TOKENS, 1 + 7), vit: (IMAGES, 2 + 6)}

LOAD = """
import json
import keras, keras_bitnet, keras_hub, numpy as np
found = []
for path, inputs in FILES:
    model = keras.models.load_model(path)
    inputs = keras.tree.map_structure_up_to(model.input, np.array, inputs)
    layers = [v for v in model._flatten_layers() if isinstance(v, keras_bitnet.layers.BitLayer)]
    outputs = keras.ops.convert_to_numpy(model(inputs)).tolist()
    found.append({"packed": sum(layer.packed for layer in layers), "outputs": outputs})
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Name of a backbone -> (path, packed model), after every step on this backend."""
    folder, made = tmp_path_factory.mktemp("hub"), {}
    for make, (inputs, count) in BACKBONES.items():
        keras.utils.set_random_seed(0)
        backbone = make()
        wanted = to_numpy(backbone(inputs))
        spec = {"weight_quantizer": "ternary", "quantization_strength": 0.0}
        model = keras_bitnet.quantize_model(backbone, spec, verbose=0)
        assert len(bit_layers(model)) == count
        np.testing.assert_allclose(to_numpy(model(inputs)), wanted, rtol=1e-4, atol=1e-5)
        for layer in bit_layers(model):
            layer.quantization_strength.assign(1.0)
        model.compile(keras.optimizers.Adam(1e-2), "mse")
        model.fit(inputs, np.zeros_like(wanted), batch_size=4, verbose=0)
        packed = keras_bitnet.pack_model(model, verbose=0)
        outputs = to_numpy(packed(inputs))
        assert mean_error(outputs, to_numpy(model(inputs))) < 1e-2
        assert mean_error(outputs, wanted) > 1e-2  # it has been trained
        path = folder / f"{make.__name__}.keras"
        packed.save(path)
        made[make] = (path, outputs)
    return made


@pytest.mark.parametrize(("backend", "tolerance"), READERS.items())
def test_packed_backbones_load_in_a_fresh_process(backend, tolerance, files):
    listed = [
        (str(path), keras.tree.map_structure(np.ndarray.tolist, BACKBONES[make][0]))
        for make, (path, _) in files.items()
    ]
    found = run_python(f"FILES = {json.dumps(listed)}\n{LOAD}", backend)
    for (make, (_, outputs)), loaded in zip(files.items(), found, strict=True):
        assert loaded["packed"] == BACKBONES[make][1], make.__name__
        assert mean_error(loaded["outputs"], outputs) <= tolerance, make.__name__
