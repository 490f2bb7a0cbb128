"""Weights in huge pages of memory, where the system has them."""

import ctypes
import mmap
import pathlib
import sys

import keras

COLLAPSE = 25  # MADV_COLLAPSE of Linux 6.1 and later
LEAST_BYTES = 32 << 20  # smaller models stay in a processor's caches
SIZE_FILE = pathlib.Path("/sys/kernel/mm/transparent_hugepage/hpage_pmd_size")


def use_huge_pages(model):
    """Moves the weights of a large model to huge pages, which a processor reads faster.

    One row of activations is as fast as its weights are read, and in pages of 4 kB that is 3 to
    30 % slower (decision 6). `load_model`, `pack_model` and the readers of other formats call
    this; call it for a model that came otherwise. Weights are copied once, 2 MB at a time, so a
    process that shares them with forked ones should do it before it forks.

    Args:
        model: A built model or layer; its variables keep their values and places.

    Returns:
        How many bytes lie in huge pages now; what the system refuses stays as it is. 0 where the
        weights are less than 32 MB, on a GPU, where the system is not Linux 6.1 or later, and in
        TensorFlow, which may copy a variable to say where it is.
    """
    size = _page_bytes()
    spans = _joined(sorted(filter(None, map(_span, model.variables))))
    if not size or sum(end - begin for begin, end in spans) < LEAST_BYTES:
        return 0
    pages = [
        page
        for begin, end in spans
        for page in range(-(-begin // size) * size, end // size * size, size)
    ]
    return size * sum(_advise(page, size) for page in pages)


def _page_bytes():
    """Bytes of a huge page, 0 where there are none."""
    try:
        return int(SIZE_FILE.read_text()) if sys.platform == "linux" else 0
    except (OSError, ValueError):
        return 0


def _advise(address, size):
    """Asks for one huge page. Returns whether it is one."""
    libc = ctypes.CDLL(None)
    return libc.madvise(ctypes.c_void_p(address), ctypes.c_size_t(size), COLLAPSE) == 0


def _span(variable):
    """Where a variable's memory begins and ends; `None`: not on the host, or unknown."""
    value = variable.value
    backend = keras.backend.backend()
    if backend == "torch":
        if value.device.type != "cpu":
            return None
        begin, size = value.data_ptr(), value.numel() * value.element_size()
    elif backend == "jax":
        if {device.platform for device in value.devices()} != {"cpu"} or len(value.devices()) > 1:
            return None
        begin, size = value.unsafe_buffer_pointer(), value.nbytes
    else:
        return None
    return (begin, begin + size) if size else None


def _joined(spans):
    """Sorted spans, those one that lie side by side but for a header of the allocator."""
    joined: list[list[int]] = []
    for begin, end in spans:
        if joined and begin - joined[-1][1] <= mmap.PAGESIZE:
            joined[-1][1] = max(joined[-1][1], end)
        else:
            joined.append([begin, end])
    return joined
