import warnings

import keras
import numpy as np
import pytest
import test_models
from helpers import BACKEND, KERAS, bit_layers, needs, relative_error, to_numpy
from rounding import clear_tokens

import keras_bitnet
from keras_bitnet.layers import BitEinsumDense, BitLinear

FLOAT_START = {"weight_quantizer": "ternary", "quantization_strength": 0.0}


@keras.saving.register_keras_serializable("tests")
class Block(keras.layers.Layer):
    """Attention made in its own build, dense layers in a list and in a dictionary."""

    def __init__(self, size, **kwargs):
        super().__init__(**kwargs)
        self.size = size
        self.attention = keras.layers.MultiHeadAttention(2, size // 2)
        self.feed_forward = [keras.layers.Dense(2 * size, "relu"), keras.layers.Dense(size)]
        self.extra = {"gate": keras.layers.Dense(size, "sigmoid"), "norms": [
            keras.layers.LayerNormalization()]}  # fmt: skip

    def call(self, x):
        x = x + self.attention(x, x)
        y = self.extra["norms"][0](x)
        gate = self.extra["gate"](y)
        for layer in self.feed_forward:
            y = layer(y)
        return x + gate * y

    def get_config(self):
        return {**super().get_config(), "size": self.size}


@keras.saving.register_keras_serializable("tests")
class Subclassed(keras.Model):
    def __init__(self, size=8, **kwargs):
        super().__init__(**kwargs)
        self.inputs_layer = keras.layers.Dense(size, "relu")
        self.block = Block(size)
        self.alias = self.inputs_layer  # one layer under two names
        self.head = keras.layers.Dense(3)

    def call(self, x):
        return self.head(self.block(self.alias(self.inputs_layer(x))))


class Gate(keras.layers.Layer):
    """Registered nowhere, as most classes of a script; so is the model around it."""

    def __init__(self, size, **kwargs):
        super().__init__(**kwargs)
        self.size = size
        self.dense = keras.layers.Dense(size, name="dense")

    def call(self, x):
        return x * self.dense(x)

    def get_config(self):
        return {**super().get_config(), "size": self.size}


class Script(keras.Model):
    def __init__(self, size, **kwargs):
        super().__init__(**kwargs)
        self.size = size
        self.stem = keras.layers.Dense(size, name="stem")
        self.gates = [Gate(size, name=f"gate{i}") for i in range(4)]
        self.head = keras.layers.Dense(2, name="head")

    def call(self, x):
        x = self.stem(x)
        for gate in self.gates:
            x = gate(x)
        return self.head(x)

    def get_config(self):
        return {**super().get_config(), "size": self.size}


def other_gate():
    class Gate(keras.layers.Dense):
        pass

    return Gate


class Unsaved(keras.layers.Layer):
    """Nobody can make it again from its config; the layer around it does."""

    def __init__(self, size, activation, **kwargs):
        super().__init__(**kwargs)
        self.size = size
        self.activation = activation

    def build(self, shape):
        self.projections = [keras.layers.Dense(self.size, name=name) for name in "ab"]
        for projection in self.projections:
            projection.build(shape)

    def call(self, x):
        return self.projections[0](x) * self.activation(self.projections[1](x))


@keras.saving.register_keras_serializable("tests")
class AroundUnsaved(keras.layers.Layer):
    def __init__(self, size, **kwargs):
        super().__init__(**kwargs)
        self.size = size
        self.gated = Unsaved(size, keras.activations.tanh, name="gated")

    def build(self, shape):
        self.gated.build(shape)
        self.a = keras.layers.Dense(self.size, name="a")
        self.a.build(shape)

    def call(self, x):
        return self.a(x) + self.gated(x)

    def get_config(self):
        return {**super().get_config(), "size": self.size}


def around_unsaved():
    inputs = keras.Input((5, 8))
    return keras.Model(inputs, keras.layers.Dense(3)(AroundUnsaved(8, name="around")(inputs)))


def sequential():
    return keras.Sequential(
        [
            keras.Input((5, 8)),
            keras.layers.Dense(16, "relu", name="first"),
            keras.layers.Dropout(0.1),
            keras.layers.Dense(3, use_bias=False, name="last"),
        ]
    )


def functional():
    inputs = keras.Input((5, 8), name="tokens")
    x = keras.layers.MultiHeadAttention(2, 4, name="attention")(inputs, inputs)
    x = keras.layers.Add()([x, inputs])
    x = Block(8, name="block")(x)
    x = keras.Sequential([keras.layers.Dense(8, name="a")], name="nested")(x)
    shared = keras.layers.Dense(8, name="shared")
    x = shared(shared(x))
    return keras.Model(inputs, keras.layers.Dense(3, name="head")(x), name="model")


def subclassed():
    model = Subclassed()
    model(np.zeros((2, 5, 8), "float32"))
    return model


MODELS = [sequential, functional, subclassed, around_unsaved]


@pytest.fixture
def x(rng):
    return rng.normal(size=(4, 5, 8)).astype("float32")


@pytest.mark.parametrize("make", MODELS)
def test_float_quantized_packed_unpacked(make, x, tmp_path):
    """The way of a model, each step's outputs equal to those of the step before."""
    if KERAS < (3, 15) and make in (functional, subclassed):
        pytest.skip("Keras 3.13 loads nothing into the norm inside of a layer without `build`")
    model = make()
    wanted = to_numpy(model(x))
    weights = [to_numpy(w) for w in model.weights]
    qat, changes = keras_bitnet.quantize_model(model, FLOAT_START, verbose=0, return_changes=True)
    np.testing.assert_allclose(to_numpy(qat(x)), wanted, rtol=1e-5, atol=1e-6)
    assert not any(type(v) is keras.layers.Dense for v in qat._flatten_layers())
    assert len(bit_layers(qat)) == sum(change.replaced_by is not None for change in changes)

    for layer in bit_layers(qat):
        layer.quantization_strength.assign(1.0)
    qat.compile(keras.optimizers.Adam(1e-2), "mse")
    qat.fit(x, np.ones_like(wanted), epochs=2, verbose=0)
    trained = to_numpy(qat(x))
    path = tmp_path / "qat.keras"
    qat.save(path)
    reloaded = keras.models.load_model(path)
    np.testing.assert_allclose(to_numpy(reloaded(x)), trained, rtol=1e-6, atol=1e-7)

    packed = keras_bitnet.pack_model(reloaded, verbose=0)
    assert all(layer.packed for layer in bit_layers(packed))
    assert relative_error(to_numpy(packed(x)), trained) < 1e-5
    assert not any("kernel" in v.name for v in packed.trainable_variables)
    packed.save(path)
    again = keras.models.load_model(path)
    np.testing.assert_array_equal(to_numpy(again(x)), to_numpy(packed(x)))
    assert type(again).__name__ == type(model).__name__

    unpacked = keras_bitnet.unpack_model(again, verbose=0)
    assert relative_error(to_numpy(unpacked(x)), trained) < 1e-5
    unpacked.compile("sgd", "mse")
    unpacked.fit(x, np.ones_like(wanted), epochs=1, verbose=0)
    for before, now in zip(weights, model.weights, strict=True):
        np.testing.assert_array_equal(before, to_numpy(now))  # never touched


def test_clone_model_of_every_stage(x):
    qat = keras_bitnet.quantize_model(functional(), verbose=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        packed = keras_bitnet.pack_model(qat, verbose=0)
    for model in (qat, packed):
        clone = keras.models.clone_model(model)
        clone.set_weights(model.get_weights())
        np.testing.assert_allclose(to_numpy(clone(x)), to_numpy(model(x)), rtol=1e-6)


def test_attention_keeps_its_class_and_arguments(x):
    model = keras_bitnet.quantize_model(functional(), verbose=0)
    attention = model.get_layer("attention")
    assert isinstance(attention, keras.layers.MultiHeadAttention)
    assert isinstance(attention._query_dense, BitEinsumDense)
    assert attention.num_heads == 2
    _, scores = attention(x, x, return_attention_scores=True, use_causal_mask=True)
    assert scores.shape == (4, 2, 5, 5)
    assert any(w.path.startswith("attention/query/kernel") for w in model.weights)


def test_inputs_keep_their_names():
    model = functional()
    names = [layer.name for layer in model.layers]
    assert names[0] == "tokens"
    quantized = keras_bitnet.quantize_model(model, verbose=0)
    assert [layer.name for layer in quantized.layers] == names


@pytest.mark.parametrize(
    ("filters", "expected"),
    [
        ("^first$", {"first"}),
        (["fir", "last"], {"first", "last"}),
        (lambda layer: layer.units == 3, {"last"}),
    ],
)
def test_filters(filters, expected):
    model, changes = keras_bitnet.quantize_model(
        sequential(), filters=filters, verbose=0, return_changes=True
    )
    quantized = {layer.name for layer in model.layers if isinstance(layer, BitLinear)}
    assert quantized == expected
    reasons = {change.path: change.reason for change in changes if change.reason}
    assert all(reason == "left out by `filters`" for reason in reasons.values())


def test_paths_of_inner_layers_can_be_filtered():
    model = keras_bitnet.quantize_model(
        functional(), filters=r"attention\w*/(query|key)$", verbose=0
    )
    assert len(bit_layers(model)) == 4  # of the attention and of that in the block


@keras.saving.register_keras_serializable("test")
class Namesakes(keras.layers.Layer):
    """Three layers of one name, the last where a number could collide."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.inner = [keras.layers.Dense(4, name=name) for name in ("dense", "dense", "dense_1")]

    def call(self, x):
        for layer in self.inner:
            x = layer(x)
        return x


def test_layers_of_one_name_have_paths_of_their_own():
    model = keras.Sequential([keras.Input((4,)), Namesakes(name="block")])
    wanted = ["block/dense", "block/dense_2", "block/dense_1"]
    model, changes = keras_bitnet.quantize_model(
        model, filters="dense_2", verbose=0, return_changes=True
    )
    assert [change.path for change in changes] == wanted
    kinds = [type(layer).__name__ for layer in model.layers[0].inner]
    assert kinds == ["Dense", "BitLinear", "Dense"]
    x = np.ones((2, 4), "float32")
    report = keras_bitnet.quantization_report(model, x, verbose=0)
    assert [layer.path for layer in report.layers] == ["block/dense_2"]


def test_spec_by_callable_and_arguments():
    def spec(layer):
        if layer.name == "first":
            return {"weight_quantizer": "int4", "norm": "rms", "norm_position": "post"}
        return None

    model, changes = keras_bitnet.quantize_model(sequential(), spec, verbose=0, return_changes=True)
    assert model.get_layer("first").weight_quantizer.bits == 4
    assert model.get_layer("first").normalization is not None
    assert changes[-1].reason == "left out by `spec`"


def test_lora_of_the_float_model_is_merged(x):
    model = sequential()
    model.get_layer("first").enable_lora(2)
    model.get_layer("first").lora_kernel_b.assign(np.ones((2, 16)))
    wanted = to_numpy(model(x))
    qat = keras_bitnet.quantize_model(model, FLOAT_START, verbose=0)
    np.testing.assert_allclose(to_numpy(qat(x)), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mode", ["int8", "float8"])
@pytest.mark.filterwarnings("ignore:.*`quantize` method", "ignore:.*found no layer")
def test_layers_that_keras_quantized_in_place_are_kept(mode, rng):
    dense = keras.layers.Dense(4)  # of float8, built anew, the weights have another order
    model = keras.Sequential([keras.Input((8,)), dense, BitLinear(2)])
    model.quantize(mode)
    x = rng.standard_normal((3, 8)).astype("float32")
    again, (change, _) = keras_bitnet.quantize_model(model, verbose=0, return_changes=True)
    assert change.reason == f"quantized by Keras already ({mode})"
    np.testing.assert_array_equal(to_numpy(again(x)), to_numpy(model(x)))


@pytest.mark.filterwarnings("ignore:.*`quantize` method")
def test_attention_that_keras_quantized_in_place_is_refused():
    i = keras.Input((4, 8))
    model = keras.Model(i, BitLinear(2)(keras.layers.MultiHeadAttention(2, 4)(i, i)))
    model.quantize("int8")
    with pytest.raises(ValueError, match="Keras quantized it in place \\(int8\\)"):
        keras_bitnet.pack_model(model, verbose=0)


def test_classes_need_not_be_registered(rng, tmp_path):
    x = rng.normal(size=(4, 6)).astype("float32")
    model = Script(8)
    model(x)
    qat, changes = keras_bitnet.quantize_model(model, "int4", verbose=0, return_changes=True)
    assert [change.path for change in changes] == [
        "stem", "gate0/dense", "gate1/dense", "gate2/dense", "gate3/dense", "head"
    ]  # fmt: skip
    packed = keras_bitnet.pack_model(keras_bitnet.calibrate(qat, x, verbose=0), verbose=0)
    packed.save(tmp_path / "packed.keras")
    own = {"Script": Script, "Gate": Gate}
    loaded = keras.models.load_model(tmp_path / "packed.keras", custom_objects=own)
    np.testing.assert_array_equal(loaded.predict(x, verbose=0), packed.predict(x, verbose=0))


class Noise(keras.layers.Layer):
    """Keras's own config of it forgets its name."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.scale = 2.0

    def call(self, x):
        return self.scale * x


class Around(keras.Model):
    """A Functional model, given and serialized as a whole; inputs in a dictionary."""

    def __init__(self, inner, **kwargs):
        super().__init__(**kwargs)
        self.inner = inner

    def call(self, inputs):
        return self.inner(inputs["x"]) + inputs["y"]

    def get_config(self):
        inner = keras.saving.serialize_keras_object(self.inner)
        return {**super().get_config(), "inner": inner}

    @classmethod
    def from_config(cls, config):
        return cls(**{**config, "inner": keras.saving.deserialize_keras_object(config["inner"])})


@keras.saving.register_keras_serializable("tests")
class Branches(keras.Model):
    """Layers in a container of a kind."""

    def __init__(self, kind, **kwargs):
        super().__init__(**kwargs)
        self.kind = kind
        layers = [keras.layers.Dense(8) for _ in range(3)]
        keys = {"numbers": (0, 1.5, "1.5%"), "dots": ("a.b", "a", "a%2Eb")}
        self.branches = set(layers) if kind == "set" else dict(zip(keys[kind], layers, strict=True))

    def build(self, input_shape):
        for layer in self._layers:
            layer.build(input_shape)

    def call(self, x):
        layers = self.branches if self.kind == "set" else self.branches.values()
        for layer in layers:
            x = keras.ops.tanh(layer(x))
        return x

    def get_config(self):
        return {**super().get_config(), "kind": self.kind}


@needs("tensorflow")  # Keras looks words and numbers up with it
def test_what_adapt_found_is_kept(rng, tmp_path):
    data = rng.normal(300, 50, (64, 4)).astype("float32")
    numbers = rng.choice([3, 5, 9], (64, 2))
    normalization = keras.layers.Normalization(name="normalization")
    normalization.adapt(data)
    lookup = keras.layers.IntegerLookup(output_mode="multi_hot", name="lookup")
    lookup.adapt(numbers)
    inputs = [keras.Input((4,)), keras.Input((2,), dtype="int64")]
    features = [normalization(inputs[0]), lookup(inputs[1])]
    outputs = keras.layers.Dense(3)(keras.layers.Concatenate()(features))
    model = keras.Model(inputs, outputs)
    start = {"weight_quantizer": "int8", "quantization_strength": 0.0}
    quantized = keras_bitnet.quantize_model(model, start, verbose=0)
    x = [data[:8], numbers[:8]]
    np.testing.assert_allclose(to_numpy(quantized(x)), to_numpy(model(x)), rtol=1e-5, atol=1e-5)
    quantized.layers[-1].quantization_strength.assign(1.0)
    packed = keras_bitnet.pack_model(quantized, verbose=0)
    packed.predict(x, verbose=0)  # on JAX it deletes the arrays that it was given
    assert relative_error(to_numpy(packed(x)), to_numpy(quantized(x))) < 1e-5
    packed.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(to_numpy(loaded(x)), to_numpy(packed(x)))


@pytest.mark.parametrize("kind", ["numbers", "dots"])
def test_layers_under_any_key_of_a_dictionary(kind, rng, tmp_path):
    model, x = Branches(kind), rng.standard_normal((4, 8)).astype("float32")
    wanted = to_numpy(model(x))
    qat = keras_bitnet.quantize_model(model, FLOAT_START, verbose=0)
    assert len(bit_layers(qat)) == 3
    np.testing.assert_allclose(to_numpy(qat(x)), wanted, rtol=1e-5, atol=1e-6)
    qat.save(tmp_path / "m.keras")
    loaded = keras.models.load_model(tmp_path / "m.keras")
    np.testing.assert_allclose(to_numpy(loaded(x)), wanted, rtol=1e-5, atol=1e-6)


def test_layers_in_a_set_are_refused():
    model = Branches("set")
    model.build((None, 8))
    with pytest.raises(ValueError, match="holds layers in a set, `branches`"):
        keras_bitnet.quantize_model(model, verbose=0)


def test_a_model_given_to_another(rng):
    inputs = keras.Input((4,))
    model = Around(keras.Model(inputs, keras.layers.Dense(3)(Noise()(inputs))))
    x = {name: rng.normal(size=(2, n)).astype("float32") for name, n in (("x", 4), ("y", 3))}
    wanted = to_numpy(model(x))
    qat = keras_bitnet.quantize_model(model, FLOAT_START, verbose=0)
    assert isinstance(qat.inner.layers[-1], BitLinear)
    np.testing.assert_allclose(to_numpy(qat(x)), wanted, rtol=1e-5, atol=1e-5)


class OnlyIntegers(Script):
    def call(self, x):
        if keras.backend.is_float_dtype(keras.backend.standardize_dtype(x.dtype)):
            raise TypeError("no floats")
        return super().call(keras.ops.cast(x, "float32"))


def test_what_cannot_be_built_again_is_said():
    model = OnlyIntegers(8)
    model(np.ones((2, 6), "int32"))
    with (
        pytest.warns(UserWarning, match="cannot be built automatically"),
        pytest.raises(ValueError, match="placeholders of float32, which made no weights"),
    ):
        keras_bitnet.quantize_model(model, verbose=0)


def test_two_classes_of_one_name_must_be_registered():
    model = keras.Sequential([keras.Input((4,)), Gate(4), other_gate()(4)])
    with pytest.raises(ValueError, match="Two classes of layers are named 'Gate'"):
        keras_bitnet.quantize_model(model, verbose=0)


class Warmup(keras.optimizers.schedules.LearningRateSchedule):
    def __call__(self, step):
        return 1e-3 * keras.ops.minimum(1.0, step / 10)

    def get_config(self):
        return {}


def squared(y_true, y_pred):
    return keras.ops.square(y_true - y_pred)


class MeanOfSquares(keras.metrics.MeanMetricWrapper):
    def __init__(self, name="squares", dtype=None):
        super().__init__(squared, name, dtype)

    def get_config(self):
        return {"name": self.name, "dtype": self.dtype}


@pytest.mark.parametrize("make", [sequential, lambda: Script(8)])
def test_compiled_models_stay_compiled(rng, make):
    x = rng.normal(size=(8, 5, 8)).astype("float32")
    model = make()
    y = np.ones(model(x).shape, "float32")
    optimizer, metric = keras.optimizers.Adam(Warmup()), MeanOfSquares()
    model.compile(optimizer, squared, metrics=[metric, lambda t, p: keras.ops.abs(t - p)])
    model.fit(x, y, verbose=0)
    qat = keras_bitnet.quantize_model(model, "int4", verbose=0)
    assert model.compiled
    assert qat.optimizer is not optimizer
    assert qat.optimizer.learning_rate == 0  # a schedule, at its first step
    qat.fit(x, y, verbose=0)
    loss, squares, absolute = qat.evaluate(x, y, verbose=0)
    assert loss == pytest.approx(squares, rel=1e-4)
    assert absolute > 0


def test_packing_an_untrained_conversion_warns():
    qat = keras_bitnet.quantize_model(sequential(), verbose=0)
    with pytest.warns(UserWarning, match=r"first, last\. Rounding alone destroys") as seen:
        keras_bitnet.pack_model(qat, verbose=0)
    assert sum(warning.category is UserWarning for warning in seen) == 1
    int8 = keras_bitnet.quantize_model(sequential(), "int8", verbose=0)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        keras_bitnet.pack_model(int8, verbose=0)


def test_packing_below_full_strength_warns():
    model = keras.Sequential([keras.Input((8,)), BitLinear(3, quantization_strength=0.5)])
    with pytest.warns(UserWarning, match=r"quantization_strength=0\.5"):
        keras_bitnet.pack_model(model, verbose=0)


def test_progress_and_report_are_printed(capsys):
    keras_bitnet.quantize_model(sequential(), filters="first")
    out = capsys.readouterr().out
    assert "1 of 2 layers quantized." in out
    assert "kept last: left out by `filters`" in out


def test_memory_and_trainable_state():
    model = keras.Sequential([keras.Input((512,)), BitLinear(256)])
    packed = keras_bitnet.pack_model(model, verbose=0)
    layer = packed.layers[0]
    assert layer.packed_kernel.nbytes * 8 / (512 * 256) < 2.001
    assert [v.name for v in packed.trainable_variables] == ["bias"]


def test_smallest_memory(tmp_path, rng):
    """Five trits a byte where a kernel is ternary without groups; the same results."""
    grouped = keras_bitnet.quantizers.Ternary(granularity="group", group_size=32)
    widths = ["ternary", grouped, "int4"]
    layers = [BitLinear(320, weight_quantizer=width) for width in widths]
    model = keras.Sequential([keras.Input((320,)), *layers])
    fast = keras_bitnet.pack_model(model, verbose=0)
    small = keras_bitnet.pack_model(model, memory="smallest", verbose=0)
    assert [layer.packed_layout for layer in small.layers] == ["trits", "tiles", "tiles"]
    assert small.layers[0].packed_kernel.nbytes * 8 / 320**2 < 1.601
    x = rng.normal(size=(3, 320)).astype("float32")
    np.testing.assert_array_equal(to_numpy(small(x)), to_numpy(fast(x)))
    with keras_bitnet.kernels.use_kernel("reference"):
        assert relative_error(to_numpy(small(x)), to_numpy(fast(x))) < 1e-5
    small.save(tmp_path / "small.keras")
    again = keras.models.load_model(tmp_path / "small.keras")
    assert again.layers[0].packed_layout == "trits"
    np.testing.assert_array_equal(to_numpy(again(x)), to_numpy(small(x)))
    unpacked = keras_bitnet.unpack_model(small, verbose=0)
    assert relative_error(to_numpy(unpacked(x)), to_numpy(small(x))) < 1e-5
    repacked = keras_bitnet.pack_model(unpacked, verbose=0)
    assert repacked.layers[0].packed_layout == "tiles"


class Lost(keras.layers.Layer):
    def __init__(self, size):
        super().__init__()
        self.dense = keras.layers.Dense(size)

    def call(self, x):
        return self.dense(x)


class Undescribed(Lost):
    def get_config(self):
        return {"size": self.size}  # there is none


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: keras_bitnet.quantize_model("model"), "Received: str"),
        (lambda: keras_bitnet.pack_model(sequential(), memory="small"), "memory='small'"),
        (
            lambda: keras_bitnet.quantize_model(keras.Sequential([keras.layers.Dense(3)])),
            "Build it",
        ),
        (lambda: keras_bitnet.quantize_model(sequential(), "int3"), "Unknown weight quantizer"),
        (lambda: keras_bitnet.quantize_model(sequential(), {"nrm": "rms"}), "Received: ..nrm.."),
        (lambda: keras_bitnet.quantize_model(sequential(), filters=3), "Received: 3 of type int"),
        (lambda: keras_bitnet.explain(sequential()), "Received: Sequential"),
        (
            lambda: keras_bitnet.quantize_model(
                keras.Sequential([keras.Input((4,)), Lost(3)]), verbose=0
            ),
            "cannot be made again from its config",
        ),
        (
            lambda: keras_bitnet.quantize_model(
                keras.Sequential([keras.Input((4,)), Undescribed(3)]), verbose=0
            ),
            "cannot be made again from its config",
        ),
    ],
)
def test_bad_arguments(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_nothing_to_do_warns():
    model = keras.Sequential([keras.Input((4,)), keras.layers.BatchNormalization()])
    with pytest.warns(UserWarning, match="found no layer to quantize"):
        keras_bitnet.quantize_model(model, verbose=0)
    with pytest.warns(UserWarning, match="No layer was packed: .* none is quantized"):
        keras_bitnet.pack_model(model, verbose=0)


def test_a_layer_that_reads_a_float_kernel_is_named():
    inner = keras.layers.SpectralNormalization(keras.layers.Dense(3), name="spectral")
    model = keras_bitnet.quantize_model(keras.Sequential([keras.Input((4,)), inner]), verbose=0)
    with pytest.raises(ValueError, match=r"'spectral' \(SpectralNormalization\).*`filters`"):
        keras_bitnet.pack_model(model, verbose=0)


def test_quantized_layers_take_other_arguments(rng):
    model = keras.Sequential([keras.Input((8,)), BitLinear(6, norm="rms", name="a"), BitLinear(3)])
    model.layers[0].normalization.scale.assign(rng.uniform(1, 2, 8))
    model.layers[0].quantization_strength.assign(0.0)
    spec = {"weight_quantizer": "int8", "activation_quantizer": None}
    with pytest.warns(UserWarning, match="no layer to quantize"):
        keras_bitnet.quantize_model(model, spec, verbose=0)
    changed = keras_bitnet.quantize_model(model, spec, "^a$", requantize=True, verbose=0)
    assert [layer.weight_quantizer.bits for layer in changed.layers] == [8, 2]
    assert changed.layers[0].activation_quantizer is None
    data = rng.normal(size=(5, 8)).astype("float32")
    np.testing.assert_array_equal(to_numpy(changed(data)), to_numpy(model(data)))  # strength 0
    rotated = keras_bitnet.quantize_model(
        changed, {"weight_quantizer": "int8", "rotation": "hadamard"}, "^a$", requantize=True,
        verbose=0,
    )  # fmt: skip
    assert relative_error(to_numpy(rotated(data)), to_numpy(model(data))) < 1e-5
    changed.layers[0].quantization_strength.assign(1.0)
    for kept in (rotated, keras_bitnet.pack_model(changed, verbose=0)):
        with pytest.warns(UserWarning, match="no layer to quantize"):
            keras_bitnet.quantize_model(kept, spec, "^a$", requantize=True, verbose=0)


def test_one_projection_of_a_language_model_takes_other_arguments(tmp_path):
    model = test_models.make_model(weight_quantizer="int8")
    spec = {"weight_quantizer": "int8", "activation_quantizer": None}
    mixed = keras_bitnet.quantize_model(
        model, spec, "decoder_layer_0/feed_forward/down", requantize=True, verbose=0
    )
    packed = keras_bitnet.pack_model(mixed, verbose=0)
    blocks = packed.backbone.decoder_layers
    assert [b.feed_forward.down_dense.activation_quantizer is None for b in blocks] == [True, False]
    tokens = clear_tokens(mixed)
    wanted = to_numpy(mixed(tokens))
    assert relative_error(to_numpy(packed(tokens)), wanted) < 1e-5
    assert relative_error(to_numpy(model(tokens)), wanted) > 1e-3
    packed.save(tmp_path / "m.keras")
    again = keras.models.load_model(tmp_path / "m.keras")
    np.testing.assert_array_equal(to_numpy(again(tokens)), to_numpy(packed(tokens)))
    assert again.generate([[1, 2, 3]], max_length=6) == packed.generate([[1, 2, 3]], max_length=6)


@pytest.mark.skipif(BACKEND == "torch", reason="Keras has no sparse tensors on PyTorch")
def test_sparse_inputs_are_what_dense_ones_are(rng):
    csr_matrix = pytest.importorskip("scipy.sparse").csr_matrix
    x = (rng.normal(size=(8, 16)) * (rng.random((8, 16)) < 0.3)).astype("float32")
    y = rng.normal(size=(8, 4)).astype("float32")
    inputs = keras.Input((16,), sparse=True)
    model = keras.Model(inputs, keras.layers.Dense(4)(inputs))
    model = keras_bitnet.quantize_model(model, "int8", verbose=0)
    model.compile("sgd", "mse")
    model.fit(csr_matrix(x), y, verbose=0)
    for last in (model, keras_bitnet.calibrate(model, csr_matrix(x), verbose=0)):
        packed = keras_bitnet.pack_model(last, verbose=0)
        wanted = to_numpy(last.layers[-1](x))
        for each in (last, packed):
            found = each.predict(csr_matrix(x), verbose=0)
            np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6)
