"""The CUDA launcher, a shared library with a C ABI (`src/shim.h`), loaded with `ctypes`."""

import ctypes
import functools
import pathlib
import threading

from keras_bitnet.kernels import cuda
from keras_bitnet.kernels.cuda import compiler
from keras_bitnet.kernels.native import find_built, joint_struct

_ABI_VERSION = 9
_lock = threading.Lock()


class MatmulStruct(ctypes.Structure):
    """`kbc_matmul` of `src/shim.h`, field by field."""

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
        ("kernel", ctypes.c_int32),
        ("weights", ctypes.c_int32),
        ("x", ctypes.c_void_p),
        ("tiles", ctypes.c_void_p),
        ("scale", ctypes.c_void_p),
        ("x_scale", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("y", ctypes.c_void_p),
        ("workspace", ctypes.c_void_p),
    )


MAX_JOINT = 4  # products of a joint one
JointStruct = joint_struct(MatmulStruct, MAX_JOINT)  # `kbc_joint` of `src/shim.h`


# Values of `weights`: who may still be writing the tiles.
WEIGHTS_UNKNOWN, WEIGHTS_READY, WEIGHTS_SETTLE = range(3)


class NormStruct(ctypes.Structure):
    """`kbc_norm` of `src/shim.h`, field by field."""

    _fields_ = (
        ("rows", ctypes.c_int64),
        ("features", ctypes.c_int64),
        ("dtype", ctypes.c_int32),
        ("combine", ctypes.c_int32),
        ("activation", ctypes.c_int32),
        ("epsilon", ctypes.c_float),
        ("x", ctypes.c_void_p),
        ("other", ctypes.c_void_p),
        ("gain", ctypes.c_void_p),
        ("combined", ctypes.c_void_p),
        ("y", ctypes.c_void_p),
    )


class FakeStruct(ctypes.Structure):
    """`kbc_fake` of `src/shim.h`, field by field."""

    _fields_ = (
        ("rows", ctypes.c_int64),
        ("columns", ctypes.c_int64),
        ("group_size", ctypes.c_int64),
        ("weight", ctypes.c_int32),
        ("dtype", ctypes.c_int32),
        ("per_tensor", ctypes.c_int32),
        ("binary", ctypes.c_int32),
        ("scale_columns", ctypes.c_int32),
        ("epsilon", ctypes.c_float),
        ("lowest", ctypes.c_float),
        ("highest", ctypes.c_float),
        ("half", ctypes.c_float),
        ("x", ctypes.c_void_p),
        ("x_scale", ctypes.c_void_p),
        ("scale", ctypes.c_void_p),
        ("strength", ctypes.c_void_p),
        ("y", ctypes.c_void_p),
        ("workspace", ctypes.c_void_p),
    )


class AttentionStruct(ctypes.Structure):
    """`kbc_attention` of `src/shim.h`, field by field."""

    _fields_ = (
        ("batch", ctypes.c_int64),
        ("tokens", ctypes.c_int64),
        ("length", ctypes.c_int64),
        ("heads", ctypes.c_int32),
        ("key_heads", ctypes.c_int32),
        ("head_dim", ctypes.c_int32),
        ("dtype", ctypes.c_int32),
        ("cache_dtype", ctypes.c_int32),
        ("tables", ctypes.c_int32),
        ("masks", ctypes.c_int32),
        ("scale", ctypes.c_float),
        ("query", ctypes.c_void_p),
        ("key", ctypes.c_void_p),
        ("value", ctypes.c_void_p),
        ("cosines", ctypes.c_void_p),
        ("sines", ctypes.c_void_p),
        ("mask", ctypes.c_void_p),
        ("index", ctypes.c_void_p),
        ("key_cache", ctypes.c_void_p),
        ("value_cache", ctypes.c_void_p),
        ("key_scale", ctypes.c_void_p),
        ("value_scale", ctypes.c_void_p),
        ("y", ctypes.c_void_p),
    )


BLOCK_WEIGHTS = 7


class DecodeStruct(ctypes.Structure):
    """`kbc_decode` of `src/shim.h`, field by field."""

    _fields_ = (
        ("blocks", ctypes.c_int64),
        ("batch", ctypes.c_int64),
        ("tokens", ctypes.c_int64),
        ("length", ctypes.c_int64),
        ("features", ctypes.c_int64),
        ("intermediate", ctypes.c_int64),
        ("group_size", ctypes.c_int64),
        ("heads", ctypes.c_int32),
        ("key_heads", ctypes.c_int32),
        ("head_dim", ctypes.c_int32),
        ("bits", ctypes.c_int32),
        ("dtype", ctypes.c_int32),
        ("activation_bits", ctypes.c_int32),
        ("weights", ctypes.c_int32),
        ("cache_dtype", ctypes.c_int32),
        ("tables", ctypes.c_int32),
        ("masks", ctypes.c_int32),
        ("activation", ctypes.c_int32),
        ("gated", ctypes.c_int32),
        ("scale_columns", ctypes.c_int32 * BLOCK_WEIGHTS),
        ("offset", ctypes.c_float),
        ("epsilon", ctypes.c_float),
        ("norm_epsilon", ctypes.c_float),
        ("scale", ctypes.c_float),
        ("x", ctypes.c_void_p),
        ("cosines", ctypes.c_void_p),
        ("sines", ctypes.c_void_p),
        ("mask", ctypes.c_void_p),
        ("index", ctypes.c_void_p),
        ("tensors", ctypes.c_void_p),
        ("y", ctypes.c_void_p),
        ("workspace", ctypes.c_void_p),
    )


# What queues a problem, by its struct.
_RUN = {
    MatmulStruct: "kbc_run",
    JointStruct: "kbc_run_joint",
    NormStruct: "kbc_run_norm",
    FakeStruct: "kbc_run_fake",
    AttentionStruct: "kbc_run_attention",
    DecodeStruct: "kbc_run_decode",
}
_WORKSPACES = {MatmulStruct: "kbc_workspace", DecodeStruct: "kbc_decode_workspace"}


def path():
    """Where the launcher lies, built or not."""
    return find_built("libbitnet_cuda.so", [pathlib.Path(__file__).parent, *cuda.__path__])


@functools.cache
def _open():
    """The loaded launcher and what is wrong with it; one of them is `None`."""
    if not path().exists():
        return (
            None,
            f"this installation has no CUDA launcher ({path().name}): it was not built at install",
        )
    try:
        loaded = ctypes.CDLL(str(path()))
    except OSError as error:
        return None, f"{path().name} does not load: {error}"
    version = loaded.kbc_abi_version()
    if version != _ABI_VERSION:
        return None, f"{path().name} has ABI version {version}, this package needs {_ABI_VERSION}"
    text, pointer, number = ctypes.c_char_p, ctypes.c_void_p, ctypes.c_int
    for name, result, arguments in (
        ("kbc_open", text, ()),
        ("kbc_device_count", number, ()),
        ("kbc_capability", number, (number,)),
        ("kbc_load", text, (number, number, ctypes.POINTER(text), number)),
        ("kbc_loaded", number, (number, number)),
        *((name, ctypes.c_int64, (pointer,)) for name in _WORKSPACES.values()),
        *((run, text, (pointer, number, pointer)) for run in _RUN.values()),
    ):
        function = getattr(loaded, name)
        function.restype, function.argtypes = result, arguments
    wrong = loaded.kbc_open()
    return (loaded, None) if wrong is None else (None, wrong.decode())


def library():
    """The launcher as a `ctypes.CDLL`, or `None`; see `reason`."""
    return _open()[0]


def device_count():
    """CUDA devices that the driver shows."""
    return 0 if library() is None else library().kbc_device_count()


@functools.cache
def reason(device):
    """Why the kernels cannot run on a device, or `None`.

    Args:
        device: Number of the device, as the driver counts.
    """
    loaded, wrong = _open()
    if loaded is None:
        return wrong
    capability = loaded.kbc_capability(device)
    if not capability:
        return f"there is no CUDA device {device}"
    return compiler.reason(capability)


def load(device, bits):
    """Gives a device the kernels of a kind of `compiler`, compiled now where they are not yet.

    Raises:
        CompileError: They cannot be compiled.
        RuntimeError: The driver does not take them.
    """
    launcher = library()
    if launcher.kbc_loaded(device, bits):
        return
    with _lock:
        data = compiler.cubins(bits, launcher.kbc_capability(device))
        wrong = launcher.kbc_load(device, bits, (ctypes.c_char_p * len(data))(*data), len(data))
    if wrong is not None:
        raise RuntimeError(f"The CUDA kernels do not load: {wrong.decode()}")


def workspace(problem):
    """Bytes of workspace that a `MatmulStruct` or a `DecodeStruct` needs."""
    return getattr(library(), _WORKSPACES[type(problem)])(ctypes.byref(problem))


def run(problem, device, stream):
    """Queues a problem, one of the structs, on a stream.

    Raises:
        RuntimeError: The launcher refuses an argument, or the driver the launch.
    """
    wrong = getattr(library(), _RUN[type(problem)])(ctypes.byref(problem), device, stream)
    if wrong is not None:
        raise RuntimeError(f"The CUDA kernel does not run: {wrong.decode()}")
