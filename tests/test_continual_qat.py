"""Continual QAT: a float decoder turned to 1.58 bits, distilled, packed."""

import keras
import numpy as np
import pytest
from helpers import mean_error, to_numpy
from test_models import LLAMA, SIZES, make_model

import keras_bitnet
from keras_bitnet.callbacks import QuantizationScheduler
from keras_bitnet.models import BitDistiller, convert_to_bitnet

FLOAT = {**LLAMA, "quantization_strength": 0.0}


def text(rows=32):
    """Sequences in which a token follows from the one before, padded on the right."""
    starts = np.arange(rows)[:, None]
    tokens = ((starts + 3 * np.arange(13)) % SIZES["vocabulary_size"]).astype("int32")
    mask = np.arange(12)[None] < 12 - starts % 4
    return {"token_ids": tokens[:, :-1], "padding_mask": mask}, tokens[:, 1:], mask


def compiled(model, rate):
    model.compile(
        keras.optimizers.Adam(rate), keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    )
    return model


@pytest.fixture(scope="module")
def teacher():
    keras.utils.set_random_seed(0)
    model = compiled(make_model(**FLOAT), 0.01)
    x, y, mask = text()
    model.fit(x, y, sample_weight=mask, batch_size=16, epochs=15, verbose=0)
    return model


def strengths(model):
    layers = [layer for layer in model._flatten_layers() if hasattr(layer, "weight_quantizer")]
    found = [getattr(layer, "quantization_strength", None) for layer in layers]
    return {float(to_numpy(s)) for s in found if s is not None}


def test_without_sub_norms_the_model_is_the_same(teacher):
    x, _, _ = text()
    model = convert_to_bitnet(teacher, sub_norm=None)
    np.testing.assert_array_equal(to_numpy(model(x)), to_numpy(teacher(x)))
    rounded = convert_to_bitnet(teacher, sub_norm=None, quantization_strength=1.0)
    assert strengths(rounded) == {1.0}
    assert mean_error(to_numpy(rounded(x)), to_numpy(teacher(x))) > 0.1


def test_gains_from_data_keep_the_model(teacher):
    x, _, _ = text()
    wanted = to_numpy(teacher(x))
    plain, fitted = convert_to_bitnet(teacher), convert_to_bitnet(teacher, x)
    assert plain.backbone.sub_norm == fitted.backbone.sub_norm == "rms"
    errors = [mean_error(to_numpy(m(x)), wanted) for m in (plain, fitted)]
    assert errors[1] < 0.3 * errors[0]
    assert errors[1] < 0.3
    # By hand, for one norm: the least squares of x ~ gain * x / rms(x) over what is no padding.
    seen = []
    down = teacher.backbone.decoder_layers[0].feed_forward.down_dense
    with keras_bitnet.layers.inputs.watch_inputs([down], lambda _, x: seen.append(to_numpy(x))):
        teacher(x)
    a = seen[0][x["padding_mask"]].astype("float64")
    b = a / np.sqrt((a**2).mean(-1, keepdims=True) + 1e-5)
    gains = [np.linalg.lstsq(b[:, [i]], a[:, i], rcond=None)[0][0] for i in range(a.shape[1])]
    norm = fitted.backbone.decoder_layers[0].feed_forward.down_dense.normalization
    np.testing.assert_allclose(to_numpy(norm.scale), gains, rtol=1e-4, atol=1e-6)
    # A model that has sub-norms keeps them.
    again = convert_to_bitnet(fitted, x)
    np.testing.assert_array_equal(to_numpy(again(x)), to_numpy(fitted(x)))


@pytest.mark.parametrize("distilled", [False, True])
def test_fit_raises_the_strength_and_learns_back(distilled, teacher, tmp_path):
    x, y, mask = text()
    before = [to_numpy(v) for v in teacher.variables]
    student = convert_to_bitnet(teacher, x)
    model = compiled(BitDistiller(student, teacher) if distilled else student, 0.01)
    rounded = compiled(convert_to_bitnet(teacher, x, quantization_strength=1.0), 0.01)
    start = rounded.evaluate(x, y, sample_weight=mask, verbose=0)
    history = model.fit(
        x, y, sample_weight=mask, batch_size=16, epochs=12, verbose=0,
        callbacks=[QuantizationScheduler(end=8, update_freq=2)],
    ).history  # fmt: skip
    assert history["quantization_strength"][-1] == 1
    assert strengths(student) == {1.0}
    assert strengths(teacher) == {0.0}
    for variable, value in zip(teacher.variables, before, strict=True):
        np.testing.assert_array_equal(to_numpy(variable), value)
    assert model.evaluate(x, y, sample_weight=mask, verbose=0) < 0.5 * start
    packed = keras_bitnet.pack_model(student, verbose=0)  # no warning: trained, and at strength 1
    assert mean_error(packed.predict(x, verbose=0), student.predict(x, verbose=0)) < 1e-2
    if distilled:
        model.save(tmp_path / "distiller.keras")
        again = keras.models.load_model(tmp_path / "distiller.keras")
        assert mean_error(to_numpy(again(x)), to_numpy(student(x))) < 1e-2


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def divergence(p, q):
    return (p * (np.log(p) - np.log(q))).sum(-1)


def relations(model, x, heads):
    """The relations of the last block by hand, `(3, batch, heads, length, length)`."""
    _, attention = model.backbone(x, attention_layer=-1)
    found = []
    for a in map(to_numpy, attention):
        a = a.reshape(*a.shape[:2], heads, -1).transpose(0, 2, 1, 3).astype("float64")
        scores = a @ a.swapaxes(-1, -2) / np.sqrt(a.shape[-1])
        found.append(softmax(np.where(x["padding_mask"][:, None, None], scores, -1e9)))
    return np.array(found)


def test_the_losses_are_the_formulas(teacher):
    x, _, mask = text(6)
    wide = make_model(**{**FLOAT, "num_query_heads": 8, "num_key_value_heads": 4})
    student = convert_to_bitnet(wide, quantization_strength=1.0)
    tau, heads = 2.0, student.backbone.num_key_value_heads
    p, q = (softmax(to_numpy(m(x)).astype("float64") / tau) for m in (teacher, student))
    logits = divergence(p, q)[mask].mean() * tau**2
    p, q = (np.maximum(relations(m, x, heads), 1e-30) for m in (teacher, student))
    attention = divergence(p, q).mean(axis=(0, 2))[mask].mean()
    for weights in ((0.0, 0.0), (3.0, 0.0), (0.0, 5.0), (3.0, 5.0)):
        distiller = BitDistiller(student, teacher, weights[0], tau, weights[1])
        distiller(x, training=True)
        found = sum(float(to_numpy(loss)) for loss in distiller.losses)
        wanted = weights[0] * logits + weights[1] * attention
        np.testing.assert_allclose(found, wanted, rtol=2e-3, atol=1e-6)
        distiller(x, training=False)
        assert not distiller.losses


def test_a_model_at_its_teacher_has_nothing_to_learn(teacher):
    x, _, _ = text(6)
    distiller = BitDistiller(convert_to_bitnet(teacher, sub_norm=None), teacher)
    distiller(x, training=True)
    assert max(abs(float(to_numpy(loss))) for loss in distiller.losses) < 1e-6


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"temperature": 0}, "temperature=0"),
        ({"logits_weight": -1}, "logits_weight=-1"),
        ({"attention_layer": 2}, "attention_layer=2"),
        ({"relation_heads": 3}, "relation_heads=3"),
        ({"teacher": keras.layers.Dense(2)}, "Received: Dense"),
        ({"teacher": make_model(vocabulary_size=51)}, "50 and 51"),
    ],
)
def test_bad_distillers(arguments, message, teacher):
    models = {"student": make_model(), "teacher": teacher}
    with pytest.raises(ValueError, match=message):
        BitDistiller(**{**models, **arguments})
    with pytest.raises(ValueError, match="same model twice"):
        BitDistiller(teacher, teacher)


def test_bad_models(teacher):
    with pytest.raises(ValueError, match="Received: Dense"):
        convert_to_bitnet(keras.layers.Dense(2))
    with pytest.raises(ValueError, match="Received: packed=True"):
        convert_to_bitnet(make_model(packed=True))
    with pytest.raises(ValueError, match="sub_norm='layer'"):
        convert_to_bitnet(teacher, sub_norm="layer")
    adapted = make_model(**FLOAT)
    adapted.backbone.decoder_layers[0].feed_forward.up_dense.enable_lora(2)
    with pytest.raises(ValueError, match="LoRA"):
        convert_to_bitnet(adapted)


def test_from_keras_hub(teacher):
    hub = pytest.importorskip("keras_hub")
    from keras_bitnet.interop import from_keras_hub

    sizes = {**SIZES, "layer_norm_epsilon": 1e-5, "rope_max_wavelength": 500.0}
    for tied in (False, True):
        llama = hub.models.LlamaBackbone(**sizes, tie_word_embeddings=tied)
        for variable in llama.trainable_variables:
            rng = np.random.default_rng(len(variable.path))
            variable.assign(rng.normal(variable.name == "scale", 0.2, variable.shape))
        x, _, mask = text(6)
        wanted = llama.token_embedding(llama(x), reverse=True)
        model = from_keras_hub(llama)
        found = to_numpy(model(x))
        assert np.abs(to_numpy(wanted)).max() > 0.5
        np.testing.assert_allclose(found[mask], to_numpy(wanted)[mask], rtol=0, atol=1e-4)
    assert convert_to_bitnet(model, x).backbone.sub_norm == "rms"
    options = {"weight_quantizer": "int8", "activation_quantizer": None}
    packed = from_keras_hub(llama, embedding_quantizer="int8", packed=True, **options)
    assert packed.packed
    assert mean_error(to_numpy(packed(x))[mask], to_numpy(wanted)[mask]) < 0.05
    with pytest.raises(ValueError, match="BitNetCausalLM"):
        from_keras_hub(teacher)
