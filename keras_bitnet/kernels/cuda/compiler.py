"""Compiles the CUDA sources: ahead of time with nvcc, else with NVRTC when a width is first used.

A compiled file (cubin) holds a part of the kernels of one width of weights, or those of training,
of attention or of norms, for one architecture. The parts of a width are compiled side by side, for
one after another they take half a minute or more. A file is named after the sources, so one of
other sources is never taken for it. It is looked for beside the package, then in the user's cache;
what is compiled goes to the cache, whole or not at all, so that several processes may compile at
once.

This file imports nothing of the package: the build runs it as

    python compiler.py FOLDER [--architectures sm_80 sm_90a sm_100 sm_120]
"""

import argparse
import concurrent.futures
import contextlib
import ctypes
import functools
import hashlib
import importlib
import importlib.util
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile

FOLDER = pathlib.Path(__file__).parent
SOURCES = FOLDER / "src"
BUILT = FOLDER / "cubins"
WIDTHS = (1, 2, 4, 8)
# They stand for a width where kernels are meant that have none.
TRAINING, ATTENTION, NORM = 0, -1, -2
KINDS = (*WIDTHS, TRAINING, ATTENTION, NORM)
# What `bitnet.cu` is compiled for, each alone; the last ones are there on sm_90a only.
PARTS = ("ROWS_F32", "ROWS_BF16", "ROWS_F16", "MMA", "WGMMA", "WGMMA16")
# What kinds without a width are compiled from, and their parts.
_OTHERS = {
    TRAINING: ("training.cu", ("ALL",)),
    ATTENTION: ("attention.cu", ("F32", "BF16", "F16", "I8")),
    NORM: ("norm.cu", ("ALL",)),
}
ARCHITECTURES = ("sm_80", "sm_90a", "sm_100", "sm_120")
OLDEST = 80
CACHE_VARIABLE = "KERAS_BITNET_CACHE"
# No contraction of float operations: results are the same bits on every device.
_OPTIONS = ("-std=c++17", "--fmad=false")


class CompileError(RuntimeError):
    """The sources were not compiled; the text says why."""


def parts(bits, name):
    """The parts that a kind of kernels is compiled in for an architecture."""
    if bits in _OTHERS:
        return _OTHERS[bits][1]
    return PARTS if name == "sm_90a" else PARTS[:4]


def _source(bits, part):
    """The source of a part of a kind of kernels, and the macros that it is compiled with."""
    file, width = (_OTHERS[bits][0], 8) if bits in _OTHERS else ("bitnet.cu", bits)
    return file, (f"-DKBC_BITS={width}", f"-DKBC_{part}")


def architecture(capability):
    """Name of the architecture of a compute capability: 90 -> "sm_90a"."""
    return "sm_90a" if capability == 90 else f"sm_{capability}"


def cubins(bits, capability):
    """The compiled kernels of a width, from files or compiled now.

    Args:
        bits: One of `KINDS`: 1, 2, 4 or 8, or what stands for one.
        capability: Ten times the compute capability of the device.

    Returns:
        A list of the bytes of cubins.

    Raises:
        CompileError: One is not there and cannot be compiled.
    """
    paths = find(bits, capability)
    if paths is not None:
        return [path.read_bytes() for path in paths]
    name = architecture(capability)
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(lambda part: _cubin(bits, name, part), parts(bits, name)))


def _cubin(bits, name, part):
    path = cache_folder() / _name(bits, name, part)
    if path.is_file():  # those of an interrupted process
        return path.read_bytes()
    data = _compile(bits, name, part)
    with contextlib.suppress(OSError):  # no place to keep it: the next process compiles again
        _write(path, data)
    return data


def find(bits, capability):
    """Paths of the compiled kernels, or `None` where one is not there."""
    # An architecture without a letter runs on all later ones of its generation.
    names = dict.fromkeys((architecture(capability), f"sm_{capability // 10}0"))
    for name in names:
        for folder in (BUILT, cache_folder()):
            paths = [folder / _name(bits, name, part) for part in parts(bits, name)]
            if all(path.is_file() for path in paths):
                return paths
    return None


def reason(capability):
    """Why there are no kernels for a compute capability, or `None`."""
    name = f"compute capability {capability // 10}.{capability % 10}"
    if capability < OLDEST:
        return f"a GPU of {name}; accepted: 8.0 and later"
    if all(find(bits, capability) for bits in KINDS) or shutil.which("nvcc"):
        return None
    library = nvrtc()
    if library is None:
        return (
            "this installation has no compiled CUDA kernels, and neither NVRTC (`pip install "
            "nvidia-cuda-nvrtc`) nor nvcc to compile them"
        )
    if capability not in library.architectures():
        return f"{library.path} does not know {name}"
    return None


def cache_folder():
    """Where compiled files are kept: `KERAS_BITNET_CACHE`, or a folder in the user's cache."""
    given = os.environ.get(CACHE_VARIABLE)
    if given:
        return pathlib.Path(given)
    base = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    return pathlib.Path(base) / "keras_bitnet"


@functools.cache
def _sources():
    """Text of every source, by name."""
    return {
        path.name: path.read_text() for path in sorted(SOURCES.glob("*.cu*")) if path.is_file()
    } | {"params.h": (SOURCES / "params.h").read_text()}


@functools.cache
def _stamp():
    digest = hashlib.sha256(repr((sorted(_sources().items()), _OPTIONS)).encode())
    return digest.hexdigest()[:16]


def _name(bits, name, part):
    return f"{_stamp()}_{name}_{bits}_{part.lower()}.cubin"


def _write(path, data):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("wb", dir=path.parent, suffix=".tmp", delete=False) as file:
        file.write(data)
    os.replace(file.name, path)


def _compile(bits, name, part):
    library = nvrtc()
    if library is not None:
        return library.compile(bits, name, part)
    if shutil.which("nvcc"):
        return _compile_with_nvcc(bits, name, part)
    raise CompileError("there is neither NVRTC nor nvcc")


def _compile_with_nvcc(bits, name, part):
    with tempfile.TemporaryDirectory() as folder:
        out = pathlib.Path(folder) / "out.cubin"
        target = name.replace("sm_", "compute_")
        main_file, macros = _source(bits, part)
        command = ["nvcc", "-cubin", f"-gencode=arch={target},code={name}", *_OPTIONS,
                   *macros, "-o", str(out), str(SOURCES / main_file)]  # fmt: skip
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        if result.returncode:
            raise CompileError(f"nvcc: {result.stderr or result.stdout}")
        return out.read_bytes()


class Nvrtc:
    """CUDA's run-time compiler, a shared library.

    Args:
        path: Where it is, or its name for the loader.
    """

    def __init__(self, path):
        self.path = str(path)
        # It looks for this one where the loader does, which is not where a wheel has it.
        for builtins in pathlib.Path(path).parent.glob("libnvrtc-builtins.so.*"):
            ctypes.CDLL(str(builtins))
        self._library = ctypes.CDLL(self.path)
        self._library.nvrtcGetErrorString.restype = ctypes.c_char_p

    def architectures(self):
        """The compute capabilities that it compiles for, times ten."""
        count = ctypes.c_int()
        self._call("nvrtcGetNumSupportedArchs", ctypes.byref(count))
        found = (ctypes.c_int * count.value)()
        self._call("nvrtcGetSupportedArchs", found)
        return tuple(found)

    def compile(self, bits, name, part):
        """The cubin of a part of a width for an architecture. Several threads may call it."""
        program = ctypes.c_void_p()
        main_file, macros = _source(bits, part)
        headers = {key: text for key, text in _sources().items() if not key.endswith(".cu")}
        texts = (ctypes.c_char_p * len(headers))(*(text.encode() for text in headers.values()))
        names = (ctypes.c_char_p * len(headers))(*(key.encode() for key in headers))
        self._call(
            "nvrtcCreateProgram", ctypes.byref(program), _sources()[main_file].encode(),
            main_file.encode(), len(headers), texts, names,
        )  # fmt: skip
        try:
            options = [f"--gpu-architecture={name}", *macros, *_OPTIONS]
            array = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
            code = self._library.nvrtcCompileProgram(program, len(options), array)
            if code:
                raise CompileError(f"NVRTC: {self._text(program, 'ProgramLog').decode()}")
            return self._text(program, "CUBIN")
        finally:
            self._library.nvrtcDestroyProgram(ctypes.byref(program))

    def _text(self, program, what):
        size = ctypes.c_size_t()
        self._call(f"nvrtcGet{what}Size", program, ctypes.byref(size))
        buffer = ctypes.create_string_buffer(size.value)
        self._call(f"nvrtcGet{what}", program, buffer)
        return buffer.raw

    def _call(self, function, *arguments):
        code = getattr(self._library, function)(*arguments)
        if code:
            error = self._library.nvrtcGetErrorString(code).decode()
            raise CompileError(f"{function}: {error}")


@functools.cache
def nvrtc():
    """The run-time compiler that PyTorch, JAX or CUDA brought, or `None`."""
    for path in _nvrtc_paths():
        try:
            return Nvrtc(path)
        except (OSError, AttributeError):
            continue
    return None


def _nvrtc_paths():
    if importlib.util.find_spec("nvidia") is not None:
        for folder in importlib.import_module("nvidia").__path__:
            yield from sorted(pathlib.Path(folder).glob("*/lib/libnvrtc.so.[0-9]*"), reverse=True)
    yield from ("libnvrtc.so.13", "libnvrtc.so.12", "libnvrtc.so")


def main():
    """Compiles every width for the given architectures with nvcc, ahead of time."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("--architectures", nargs="+", default=ARCHITECTURES)
    arguments = parser.parse_args()
    for name in arguments.architectures:
        for bits in KINDS:
            for part in parts(bits, name):
                path = arguments.folder / _name(bits, name, part)
                if not path.exists():
                    _write(path, _compile_with_nvcc(bits, name, part))
                print(path)


if __name__ == "__main__":
    sys.exit(main())
