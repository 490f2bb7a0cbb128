"""Attention of new tokens to a cache by CUDA kernels, for PyTorch: one operator."""

import torch

from keras_bitnet.kernels import cuda, torch_operators
from keras_bitnet.kernels.attention import CACHE
from keras_bitnet.kernels.cuda import compiler, library
from keras_bitnet.kernels.cuda.torch import device_reason, queue
from keras_bitnet.kernels.select import Kernel
from keras_bitnet.kernels.torch_operators import DTYPES

_SCHEMA = (
    "attend_next_cuda(Tensor query, Tensor key, Tensor value, Tensor? cosines, Tensor? sines, "
    "Tensor? mask, Tensor index, Tensor(a!) key_cache, Tensor(b!) value_cache, "
    "Tensor(c!)? key_scale, Tensor(d!)? value_scale, float scale) -> Tensor"
)
CACHE_DTYPES = {**DTYPES, torch.int8: 3}


def refuse(problem):
    """Why the kernel cannot run an `Attention`, or `None`."""
    return device_reason(problem.device) or cuda.refuse_attention(problem)


def run(cache, query, key, value, index, scale, mask=None, rotary=None):
    """As `attend_next`, for a problem that was not refused; the cache is written in place."""
    cosines, sines = (None, None) if rotary is None else rotary
    index = torch.as_tensor(index, dtype=torch.int32, device=query.device)
    buffers = (cache.get(name) for name in CACHE)
    y = torch.ops.keras_bitnet.attend_next_cuda(
        query, key, value, cosines, sines, mask, index, *buffers, scale
    )
    return y, cache


def _launch(
    query, key, value, cosines, sines, mask, index, key_cache, value_cache, key_scale, value_scale,
    scale,
):  # fmt: skip
    query, key, value = query.contiguous(), key.contiguous(), value.contiguous()
    cosines, sines, mask = (x if x is None else x.contiguous() for x in (cosines, sines, mask))
    caches = {"key_cache": key_cache, "value_cache": value_cache}
    scales = {} if key_scale is None else {"key_scale": key_scale, "value_scale": value_scale}
    _check(query, key, value, cosines, sines, mask, index, caches, scales)
    batch, tokens, heads, head_dim = query.shape
    y = torch.empty_like(query)
    tables = {} if cosines is None else {"cosines": cosines, "sines": sines}
    masks = {} if mask is None else {"mask": mask}
    tensors = {"query": query, "key": key, "value": value, "index": index, "y": y, **caches,
               **scales, **tables, **masks}  # fmt: skip
    problem = library.AttentionStruct(
        batch=batch,
        tokens=tokens,
        length=key_cache.shape[2],
        heads=heads,
        key_heads=key_cache.shape[1],
        head_dim=head_dim,
        dtype=DTYPES[query.dtype],
        cache_dtype=CACHE_DTYPES[key_cache.dtype],
        tables=len(cosines) if tables else 1,
        masks=len(mask) if masks else 1,
        scale=scale,
        **{name: tensor.data_ptr() for name, tensor in tensors.items()},
    )
    queue(problem, compiler.ATTENTION, query.get_device())
    return y


def _check(query, key, value, cosines, sines, mask, index, caches, scales):
    cache = caches["key_cache"]
    (batch, tokens, heads, head_dim), (_, key_heads, length, _) = query.shape, cache.shape
    rows, places = {(batch, tokens, key_heads, head_dim)}, (batch, key_heads, length)
    turned = {(n, tokens, 1, head_dim) for n in (1, batch)}
    wanted: list[tuple] = [
        ("query", query, query.dtype, {(batch, tokens, heads, head_dim)}),
        ("key", key, query.dtype, rows),
        ("value", value, query.dtype, rows),
        ("cosines", cosines, torch.float32, turned),
        ("sines", sines, torch.float32, turned),
        ("mask", mask, torch.bool, {(n, tokens, length) for n in (1, batch)}),
        ("index", index, torch.int32, {(), (1,)}),
        *((name, x, cache.dtype, {(*places, head_dim)}) for name, x in caches.items()),
        *((name, x, torch.float32, {(*places, 1)}) for name, x in scales.items()),
    ]
    torch_operators.check(query.device, wanted)


torch_operators.define(_SCHEMA, _launch, "CUDA", torch_operators.fake_like)

CUDA = Kernel(cuda.NAME, refuse, run)
