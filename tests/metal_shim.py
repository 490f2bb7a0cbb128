"""Executes the Metal shader on the CPU: built as C++, called as `torch.mps` would call it."""

import ctypes
import functools
import pathlib
import re
import shutil
import subprocess

import numpy as np
import torch

FOLDER = pathlib.Path(__file__).parent / "metal"
MARGIN = 4096  # bytes around each operand that a kernel must leave alone
MARGIN_BYTE = 0xFE  # a NaN as half, huge as float


@functools.cache
def obstacle():
    """Why the shader cannot be built here, or `None`."""
    if shutil.which("g++") is None:
        return "g++ is missing"
    program = b"#include <ucontext.h>\n_Float16 half; int main() {}"
    command = ["g++", "-std=c++20", "-fsyntax-only", "-x", "c++", "-"]
    result = subprocess.run(command, input=program, capture_output=True, check=False)
    return None if result.returncode == 0 else f"g++ lacks _Float16 or ucontext: {result.stderr}"


def kernel_names(source):
    """The kernels that the text of a shader defines."""
    names = re.findall(r"^kernel void (\w+)\(", source, re.MULTILINE)
    for bits in re.findall(r"^MATMULS\((\d)\)", source, re.MULTILINE):
        names += [f"{kind}_{bits}_{rows}" for kind in ("matmul", "grouped") for rows in (1, 4)]
    return names


def build(source, folder):
    """Compiles the text of a shader in a folder of its own."""
    shader, library = folder / "shader.metal", folder / "shader.so"
    shader.write_text(source)
    command = [
        *("g++", "-std=c++20", "-O1", "-shared", "-fPIC", "-ffp-contract=off"),
        f"-DKERNELS={' '.join(f'KERNEL({name})' for name in kernel_names(source))}",
        *("-Wno-attributes", "-I", FOLDER, f'-DSHADER="{shader}"', FOLDER / "shim.cc"),
        *("-o", library),
    ]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-4000:]
    return Shader(library)


class Shader:
    """As what `torch.mps.compile_shader` gives; operands are CPU tensors.

    Each kernel runs twice, its lanes forwards and backwards, which must not matter.
    """

    def __init__(self, library):
        self._library = ctypes.CDLL(str(library))
        self._library.launch.restype = ctypes.c_char_p
        self.launched = []

    def __getattr__(self, name):
        return functools.partial(self._run, name)

    def _run(self, name, *operands, threads, group_size):
        self.launched.append(name)
        threads, group_size = np.atleast_1d(threads), np.atleast_1d(group_size)
        assert len(threads) == len(group_size) < 4
        assert np.prod(group_size) <= 1024
        assert (threads % group_size == 0).all(), "the last threadgroup would be smaller"
        grid = [[*values, 1][:2] for values in (threads // group_size, group_size)]
        forwards, backwards = _buffers(operands), _buffers(operands)
        for reverse, buffers in enumerate((forwards, backwards)):
            pointers = (ctypes.c_void_p * len(buffers))(*(buffer.address for buffer in buffers))
            sizes = [(ctypes.c_uint * 2)(*values) for values in grid]
            wrong = self._library.launch(name.encode(), pointers, *sizes, reverse)
            assert wrong is None, f"{name}: {wrong.decode()}"
        for one, other in zip(forwards, backwards, strict=True):
            assert (one.bytes == other.bytes).all(), f"{name}: the order of lanes matters"
            one.write_back()


def _buffers(operands):
    """A buffer an operand; one for both where the same tensor is passed twice."""
    distinct = {id(operand): _Buffer(operand) for operand in operands}
    return [distinct[id(operand)] for operand in operands]


class _Buffer:
    """The bytes of an operand between margins."""

    def __init__(self, operand):
        self.operand = operand
        if isinstance(operand, torch.Tensor):
            assert operand.is_contiguous()
            assert operand.numel(), "an empty tensor has no buffer"
            if operand.dtype == torch.uint8:
                assert operand.storage_offset() % 16 == 0, "the shader reads 16 bytes at once"
            data = operand.detach().reshape(-1).view(torch.uint8).numpy()
        else:  # the type of the first element is that of all
            kind = {int: np.int64, float: np.float32}[type(operand[0])]
            assert all(type(value) is type(operand[0]) for value in operand), operand
            data = np.asarray(operand, kind).view(np.uint8)
        self.bytes = np.full(len(data) + 2 * MARGIN, MARGIN_BYTE, np.uint8)
        self.inside = self.bytes[MARGIN:-MARGIN]
        self.inside[:] = data
        self.address = self.inside.ctypes.data

    def write_back(self):
        margins = np.concatenate([self.bytes[:MARGIN], self.bytes[-MARGIN:]])
        assert (margins == MARGIN_BYTE).all(), "a kernel wrote outside an operand"
        if isinstance(self.operand, torch.Tensor):
            target = self.operand.detach().reshape(-1).view(torch.uint8)
            target.copy_(torch.from_numpy(self.inside))
