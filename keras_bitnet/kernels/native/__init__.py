"""The native CPU kernels: one shared library with a C ABI, loaded with `ctypes`.

The library is optional. `library()` gives it or `None`, and `reason()` says why it is missing.
`src/bitnet.h` is the ABI; `matmul` and `accumulate` call it on NumPy arrays.
"""

import ctypes
import functools
import math
import pathlib
import sys
import threading

import numpy as np

from keras_bitnet.ops import layout

_ABI_VERSION = 11
_DTYPES = {"float32": 0, "bfloat16": 1, "float16": 2}
_SUFFIXES = {"darwin": ".dylib", "win32": ".dll"}
_lock = threading.Lock()


class WindowStruct(ctypes.Structure):
    """`kbn_window` of `src/bitnet.h`, field by field."""

    _fields_ = tuple(
        (name, ctypes.c_int64 * 3)
        for name in ("lengths", "positions", "size", "strides", "dilation", "before")
    )

    @classmethod
    def of(cls, window, shape):
        """A `keras_bitnet.ops.window.Window` on images of a shape `(..., *spatial, channels)`."""
        axes, _, *of_three = window.numbers
        lengths = shape[-1 - axes : -1]
        positions = window.positions(shape)[-axes:]
        before = [window.padding_of(axis, length)[0] for axis, length in enumerate(lengths)]
        first = (1,) * (3 - axes)
        sizes = (of_three[i : i + 3] for i in (0, 3, 6))
        rows = ((*first, *lengths), (*first, *positions), *sizes, (*(0,) * len(first), *before))
        return cls(*((ctypes.c_int64 * 3)(*row) for row in rows))


class MatmulStruct(ctypes.Structure):
    """`kbn_matmul` of `src/bitnet.h`, field by field."""

    _fields_ = (
        ("rows", ctypes.c_int64),
        ("in_features", ctypes.c_int64),
        ("out_features", ctypes.c_int64),
        ("group_size", ctypes.c_int64),
        ("bits", ctypes.c_int32),
        ("dtype", ctypes.c_int32),
        ("activation_bits", ctypes.c_int32),
        ("per_tensor", ctypes.c_int32),
        ("offset", ctypes.c_float),
        ("epsilon", ctypes.c_float),
        ("scale_columns", ctypes.c_int32),
        ("layout", ctypes.c_int32),
        ("norm_epsilon", ctypes.c_float),
        ("x", ctypes.c_void_p),
        ("tiles", ctypes.c_void_p),
        ("scale", ctypes.c_void_p),
        ("x_scale", ctypes.c_void_p),
        ("window", ctypes.c_void_p),
        ("gain", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("y", ctypes.c_void_p),
    )


def joint_struct(matmul, most):
    """The structure of up to `most` matmuls of the same activations, each a structure `matmul`."""
    pointers = ctypes.POINTER(matmul) * most

    class JointStruct(ctypes.Structure):
        _fields_ = (("count", ctypes.c_int32), ("matmuls", pointers))

        @classmethod
        def of(cls, structs):
            """Points to structs, which the result keeps alive."""
            return cls(len(structs), pointers(*map(ctypes.pointer, structs)))

    return JointStruct


MAX_JOINT = 8  # matmuls of a joint one
JointStruct = joint_struct(MatmulStruct, MAX_JOINT)  # `kbn_joint` of `src/bitnet.h`


def library_path(name="libbitnet"):
    """Where a native library of this package lies, built or not."""
    file = name + _SUFFIXES.get(sys.platform, ".so")
    return find_built(file, [pathlib.Path(__file__).parent, *__path__])


def find_built(file, folders):
    """The path of a file in the first of some folders that has it, or in the first of all.

    An editable install leaves the sources where they are and puts what it builds into
    site-packages: the `__path__` of a package names both.
    """
    paths = [pathlib.Path(folder, file) for folder in folders]
    return next((path for path in paths if path.exists()), paths[0])


def library():
    """The loaded library as a `ctypes.CDLL`, or `None`; see `reason`."""
    return _load()[0]


def reason():
    """Why there is no native library, or `None` where there is one."""
    return _load()[1]


def isa():
    """Name of the instruction set in use: "amx", "avx512vnni", "avxvnni", "avx2", "neon" or
    "generic".

    Raises:
        RuntimeError: The library is missing.
        ValueError: `KERAS_BITNET_ISA` names none that runs here.
    """
    name = _required().kbn_isa()
    if name is None:
        _check(_required().kbn_run(ctypes.byref(_nothing()), None))
    return name.decode()


def isas():
    """Names of the instruction sets that this build and machine can run, best first."""
    return _required().kbn_isas().decode().split(",")


def set_isa(name):
    """Forces an instruction set for the whole process; `"auto"` takes the best one.

    Raises:
        ValueError: It cannot run here.
    """
    _check(_required().kbn_set_isa(name.encode()))


def threads():
    """Threads of the library's own pool, the calling one included."""
    return _required().kbn_threads()


def set_threads(count):
    """Sets the threads of the library's own pool, the calling one included."""
    if count < 1:
        raise ValueError(f"`count` must be at least 1. Received: count={count}")
    _required().kbn_set_threads(int(count))


def matmul(
    x,
    packed,
    activation_bits=8,
    per_tensor=False,
    epsilon=1e-5,
    x_scale=None,
    bias=None,
    out=None,
    window=None,
):
    """Multiplies NumPy activations by a packed weight; see `ops.bit_matmul` for the meaning.

    Args:
        x: Array `(..., in_features)` of float32, bfloat16 or float16.
        packed: `PackedTensor` of NumPy arrays.
        activation_bits: 8 or 4, or 0: `x` stays float.
        per_tensor: One activation scale for all of `x` instead of one for each row.
        epsilon: Lower bound of the absolute maximum of the activations.
        x_scale: A static activation scale, or `None` to compute it.
        bias: Array `(out_features,)` or `None`.
        out: Contiguous array to write to, of the dtype of `x`, or `None`.
        window: `keras_bitnet.ops.window.Window` that sees the rows in images `x`, or `None`.

    Returns:
        Array `(..., out_features)` of the dtype of `x`.

    Raises:
        ValueError: The library refuses an argument; it says which.
    """
    x = np.ascontiguousarray(x)
    activations = x, activation_bits, per_tensor, epsilon, x_scale
    problem = _product(activations, packed, bias, out, window)
    _check(_required().kbn_run(ctypes.byref(problem.struct), None))
    return problem.y


def joint_matmul(x, packed, activation_bits=8, biases=None):
    """Multiplies NumPy activations by several packed weights at once; they are quantized once.

    Args:
        x: Array `(..., in_features)` of float32, bfloat16 or float16.
        packed: `PackedTensor`s of NumPy arrays that differ in scales, codes and outputs alone, at
            most `MAX_JOINT`.
        activation_bits: 8 or 4, or 0: `x` stays float.
        biases: Arrays `(out_features,)` or `None`, one for each weight; none by default.

    Returns:
        A list of arrays `(..., out_features)` of the dtype of `x`.

    Raises:
        ValueError: The library refuses an argument; it says which.
    """
    x = np.ascontiguousarray(x)
    activations = x, activation_bits, False, 1e-5, None
    biases = biases or [None] * len(packed)
    problems = [
        _product(activations, weight, bias) for weight, bias in zip(packed, biases, strict=True)
    ]
    joint = JointStruct.of([problem.struct for problem in problems])
    _check(_required().kbn_run_joint(ctypes.byref(joint), None))
    return [problem.y for problem in problems]


def _product(activations, packed, bias, out=None, window=None):
    """The problem of one weight, with its result as `y`."""
    x, *_ = activations
    last = packed.in_features // (1 if window is None else window.count)
    if x.dtype.name not in _DTYPES or x.shape[-1:] != (last,):
        raise ValueError(
            f"`x` must be an array (..., {last}) of one of {tuple(_DTYPES)}. "
            f"Received: {x.dtype} array of shape {x.shape}"
        )
    shape = (*(x.shape[:-1] if window is None else window.positions(x.shape)), packed.out_features)
    if out is None:
        out = np.empty(shape, x.dtype)
    elif out.shape != shape or out.dtype != x.dtype or not out.flags.c_contiguous:
        raise ValueError(
            f"`out` must be a contiguous {x.dtype} array of shape {shape}. "
            f"Received: {out.dtype} array of shape {out.shape}"
        )
    problem = _activations(*activations)
    problem.weights(packed)
    if window is not None:
        placed = WindowStruct.of(window, x.shape)
        problem.arrays.append(placed)
        problem.struct.window = ctypes.addressof(placed)
        problem.struct.rows = math.prod(shape[:-1])
        problem.struct.in_features = packed.in_features
    if bias is not None:
        problem.point("bias", np.ascontiguousarray(bias, np.float32), (packed.out_features,))
    problem.point("y", out, shape)
    problem.y = out
    return problem


def quantize(x, activation_bits=8, per_tensor=False, epsilon=1e-5, x_scale=None):
    """The activation codes `int8 (m, k)` and scales `float32 (m,)` that `matmul` uses.

    Args: as for `matmul`, `x` of shape `(m, k)`.
    """
    x = np.ascontiguousarray(x)
    codes, scales = np.empty(x.shape, np.int8), np.empty(x.shape[0], np.float32)
    problem = _activations(x, activation_bits, per_tensor, epsilon, x_scale)
    _check(
        _required().kbn_quantize(
            ctypes.byref(problem.struct), codes.ctypes.data, scales.ctypes.data
        )
    )
    return codes, scales


def accumulate(x_codes, packed):
    """The exact integer sums, as `keras_bitnet.ops.reference.accumulate`.

    Args:
        x_codes: `int8` array `(m, in_features)`.
        packed: `PackedTensor` of NumPy arrays.

    Returns:
        `int32` array `(m, groups, out_features)`; one group where the weight has none.
    """
    x_codes = np.ascontiguousarray(x_codes, np.int8)
    rows = x_codes.shape[0]
    groups = -(-packed.in_features // (packed.group_size or packed.in_features))
    sums = np.empty((rows, groups, packed.out_features), np.int32)
    problem = _Problem(rows, packed.in_features)
    problem.weights(packed)
    _check(
        _required().kbn_accumulate(
            ctypes.byref(problem.struct), x_codes.ctypes.data, sums.ctypes.data
        )
    )
    return sums


def tiles_from_trits(packed, in_features):
    """As `keras_bitnet.ops.layout.tiles_from_trits`, into tiles of two bits."""
    packed = layout.as_packed_trits(packed, in_features)
    tiles = np.empty(layout.tiles_shape(in_features, packed.shape[1], 2), np.uint8)
    sizes = in_features, packed.shape[1]
    _check(_required().kbn_tiles_from_trits(packed.ctypes.data, *sizes, tiles.ctypes.data))
    return tiles


class _Problem:
    """A `kbn_matmul` and the arrays that it points to."""

    def __init__(self, rows, in_features):
        self.struct = MatmulStruct(rows=rows, in_features=in_features)
        self.arrays = []
        self.y = None

    def point(self, field, array, shape):
        if array.shape != tuple(shape):
            raise ValueError(f"`{field}` must have shape {shape}. Received: {array.shape}")
        self.arrays.append(array)
        setattr(self.struct, field, array.ctypes.data)

    def weights(self, packed):
        tiles = np.ascontiguousarray(packed.tiles, np.uint8)
        scale = np.ascontiguousarray(packed.scale, np.float32)
        self.struct.out_features = packed.out_features
        self.struct.bits = packed.bits
        self.struct.layout = packed.layout == "trits"
        self.struct.offset = packed.offset
        self.struct.group_size = packed.group_size or 0
        self.struct.scale_columns = scale.shape[1]
        self.point("tiles", tiles, tiles.shape)
        self.point("scale", scale, scale.shape)


def _activations(x, activation_bits, per_tensor, epsilon, x_scale):
    problem = _Problem(x.size // x.shape[-1], x.shape[-1])
    problem.struct.dtype = _DTYPES[x.dtype.name]
    problem.struct.activation_bits = activation_bits
    problem.struct.per_tensor = per_tensor
    problem.struct.epsilon = epsilon
    problem.point("x", x, x.shape)
    if x_scale is not None:
        problem.point("x_scale", np.asarray(x_scale, np.float32).reshape(1), (1,))
    return problem


def _nothing():
    """A valid problem without rows: running it reports only what is wrong with the library."""
    problem = _Problem(0, 1)
    problem.arrays.append(np.zeros(64, np.uint8))
    struct = problem.struct
    struct.out_features = struct.scale_columns = 1
    struct.bits = struct.activation_bits = 8
    struct.epsilon = 1.0
    struct.tiles = struct.scale = problem.arrays[0].ctypes.data
    return struct


def _check(code):
    if code:
        raise ValueError(_required().kbn_error(code).decode())


def _required():
    loaded, why = _load()
    if loaded is None:
        raise RuntimeError(f"The native kernels are not available: {why}")
    return loaded


def _load():
    with _lock:
        return _load_once()


@functools.cache
def _load_once():
    path = library_path()
    if not path.exists():
        return (
            None,
            f"this installation has no native library ({path.name}): it was not built at install",
        )
    try:
        loaded = ctypes.CDLL(str(path))
    except OSError as error:
        return None, f"{path.name} does not load: {error}"
    version = loaded.kbn_abi_version()
    if version != _ABI_VERSION:
        return None, f"{path.name} has ABI version {version}, this package needs {_ABI_VERSION}"
    pointer = ctypes.c_void_p
    for name, result, arguments in (
        ("kbn_run", ctypes.c_int, (pointer, pointer)),
        ("kbn_run_joint", ctypes.c_int, (pointer, pointer)),
        ("kbn_quantize", ctypes.c_int, (pointer, pointer, pointer)),
        ("kbn_accumulate", ctypes.c_int, (pointer, pointer, pointer)),
        ("kbn_tiles_from_trits", ctypes.c_int, (pointer, ctypes.c_int64, ctypes.c_int64, pointer)),
        ("kbn_error", ctypes.c_char_p, (ctypes.c_int,)),
        ("kbn_isa", ctypes.c_char_p, ()),
        ("kbn_isas", ctypes.c_char_p, ()),
        ("kbn_set_isa", ctypes.c_int, (ctypes.c_char_p,)),
        ("kbn_set_threads", None, (ctypes.c_int,)),
        ("kbn_threads", ctypes.c_int, ()),
        ("kbn_chain_keep", ctypes.c_int32, (pointer, ctypes.c_int64)),
        ("kbn_chain_drop", None, (ctypes.c_int32,)),
    ):
        function = getattr(loaded, name)
        function.restype, function.argtypes = result, arguments
    return loaded, None
