"""What the package promises as a package."""

import re

from helpers import ROOT, run_python

import keras_bitnet


def test_importing_it_imports_no_other_framework():
    code = (
        "import sys, json, keras; before = set(sys.modules); import keras_bitnet\n"
        "import keras_bitnet.kernels, keras_bitnet.layers\n"
        "new = {m.split('.')[0] for m in set(sys.modules) - before}\n"
        "print(json.dumps(sorted(new & {'jax', 'torch', 'tensorflow', 'rich', 'matplotlib'})))"
    )
    assert run_python(code) == []


def test_public_names():
    names = {"callbacks", "explain", "layers", "ops", "pack_model", "quantize_model",
             "quantizers", "summary", "unpack_model"}  # fmt: skip
    assert names <= set(keras_bitnet.__all__)
    for module in (keras_bitnet, keras_bitnet.layers, keras_bitnet.ops, keras_bitnet.quantizers):
        for name in module.__all__:
            thing = getattr(module, name)
            assert thing.__doc__, f"{module.__name__}.{name} has no docstring"


def test_version_is_that_of_the_changelog():
    changelog = (ROOT / "CHANGELOG.md").read_text()
    assert re.search(r"^## (\S+)", changelog, re.M)[1] == keras_bitnet.__version__
