"""Blocks of a decoder for new tokens by the CUDA kernels, for PyTorch: one operator.

What a block computes is queued in a call of the launcher, its norms with the additions and the
activation beside them as one kernel each. Eager PyTorch takes longer to call the operators of a
block than a GPU to run them.
"""

import ctypes

import torch

from keras_bitnet.kernels import torch_operators
from keras_bitnet.kernels.attention import CACHE
from keras_bitnet.kernels.cuda import compiler, library
from keras_bitnet.kernels.cuda.torch import queue
from keras_bitnet.kernels.cuda.torch_attention import CACHE_DTYPES
from keras_bitnet.kernels.torch_operators import DTYPES, pointer

_SCHEMA = (
    "decode_blocks_cuda(Tensor x, Tensor[] weights, Tensor(a!)[] caches, Tensor? cosines, "
    "Tensor? sines, Tensor? mask, Tensor index, int heads, int intermediate, int activation, "
    "int bits, int group_size, int activation_bits, float offset, float epsilon, "
    "float norm_epsilon, float scale) -> Tensor"
)
_NORMS = 4
_NONE = torch.empty(0)


def find():
    """`run`, or `None` where it cannot: it has no gradient, and `torch.compile` its own ways."""
    return None if torch.is_grad_enabled() or torch.compiler.is_compiling() else run


def run(facts, x, weights, cache, index, mask, rotary):
    """As `keras_bitnet.kernels.decoder_block.reference`; the cache is written in place."""
    return run_all(facts, x, [weights], [cache], index, mask, rotary), cache


def run_all(facts, x, weights, caches, index, mask, rotary):
    """What blocks of the same facts make of `x` one after another; other arguments as `run`.

    Args:
        weights: `Weights` of each.
        caches: The cache of each.
    """
    cosines, sines = rotary or (None, None)
    if not torch.is_tensor(index):
        index = torch.full((1,), index, dtype=torch.int32, device=x.device)
    attributes = facts.attributes
    del attributes["trits"]
    return torch.ops.keras_bitnet.decode_blocks_cuda(
        x,
        # To trace a list it must not hold `None`.
        [_NONE if tensor is None else tensor for own in weights for tensor in _tensors(own)],
        [cache[name] for cache in caches for name in CACHE if name in cache],
        cosines,
        sines,
        mask,
        index.to(torch.int32),
        *attributes.values(),
    )


def _tensors(weights):
    """Tiles, scale and bias of every weight, then the gains, `None` for what is not there."""
    products = (*weights.products, (None,) * 3)[: library.BLOCK_WEIGHTS]
    return [*(tensor for product in products for tensor in product), *weights.gains]


def _launch(x, weights, caches, cosines, sines, mask, index, *numbers):
    heads, intermediate, activation, bits, group_size, activation_bits, *floats = numbers
    offset, epsilon, norm_epsilon, scale = floats
    count = 3 * library.BLOCK_WEIGHTS + _NORMS
    blocks, kept = len(weights) // count, len(caches) * count // len(weights)
    x, (batch, tokens, features) = x.contiguous(), x.shape
    cosines, sines, mask = (t if t is None else t.contiguous() for t in (cosines, sines, mask))
    key_cache = caches[0]
    _, key_heads, length, head_dim = key_cache.shape
    inner = (heads * head_dim, key_heads * head_dim, intermediate)
    weights = [_present(tensor) for tensor in weights]
    gated = weights[3 * (library.BLOCK_WEIGHTS - 1)] is not None
    _check(x, weights, caches, (cosines, sines, mask, index), inner, bits, group_size)
    y = torch.empty_like(x)
    rows = [
        [*weights[i * count : (i + 1) * count], *caches[i * kept : (i + 1) * kept]]
        for i in range(blocks)
    ]
    addresses = [pointer(t) for row in rows for t in (*row, *[None] * (len(CACHE) - kept))]
    array = (ctypes.c_void_p * len(addresses))(*addresses)
    scales = weights[1 : 3 * library.BLOCK_WEIGHTS : 3]
    columns = [1 if one is None else one.shape[1] for one in scales]
    capturing = torch.cuda.is_current_stream_capturing()
    problem = library.DecodeStruct(
        blocks=blocks,
        batch=batch,
        tokens=tokens,
        length=length,
        features=features,
        intermediate=intermediate,
        group_size=group_size,
        heads=heads,
        key_heads=key_heads,
        head_dim=head_dim,
        bits=bits,
        dtype=DTYPES[x.dtype],
        activation_bits=activation_bits,
        # As in `_writers` of `keras_bitnet.kernels.cuda.torch`.
        weights=library.WEIGHTS_READY if capturing else library.WEIGHTS_UNKNOWN,
        cache_dtype=CACHE_DTYPES[key_cache.dtype],
        tables=1 if cosines is None else len(cosines),
        masks=1 if mask is None else len(mask),
        activation=activation,
        gated=gated,
        scale_columns=(ctypes.c_int32 * library.BLOCK_WEIGHTS)(*columns),
        offset=offset,
        epsilon=epsilon,
        norm_epsilon=norm_epsilon,
        scale=scale,
        x=x.data_ptr(),
        cosines=pointer(cosines),
        sines=pointer(sines),
        mask=pointer(mask),
        index=index.data_ptr(),
        tensors=ctypes.addressof(array),
        y=y.data_ptr(),
    )
    workspace = torch.empty(library.workspace(problem), dtype=torch.uint8, device=x.device)
    problem.workspace = workspace.data_ptr()
    device = x.get_device()
    for kind in (compiler.ATTENTION, compiler.NORM):
        library.load(device, kind)
    queue(problem, bits, device)
    return y


def _present(tensor):
    """A tensor at an address that the kernels take, `None` for one without elements."""
    if not tensor.numel():
        return None
    return tensor if tensor.data_ptr() % 16 == 0 else tensor.clone()


def _check(x, weights, caches, shared, inner, bits, group_size):
    """Refuses operands whose shapes, dtypes or devices are not those of a decoder's blocks."""
    cosines, sines, mask, index = shared
    (batch, tokens, features), (_, key_heads, length, head_dim) = x.shape, caches[0].shape
    heads, keys, ffn = inner
    count, kept = 3 * library.BLOCK_WEIGHTS + _NORMS, 2 if caches[0].dtype != torch.int8 else 4
    sizes = [(features, heads), (features, keys), (features, keys), (heads, features),
             (features, ffn), (ffn, features), (features, ffn)]  # fmt: skip
    wanted: list[tuple] = []
    for i, (k, n) in enumerate(sizes):
        tiles, scale, bias = weights[3 * i : 3 * i + 3]
        groups = -(-k // group_size) if group_size else 1
        wanted += (
            ("tiles", tiles, torch.uint8, {(-(-n // 16), -(-k * bits // 32), 16, 4)}),
            ("scale", scale, torch.float32, {(groups, 1), (groups, n)}),
            ("bias", bias, torch.float32, {(n,)}),
        )
    gains = zip(weights[count - _NORMS : count], (features, heads, features, ffn), strict=True)
    wanted += [("gain", gain, torch.float32, {(size,)}) for gain, size in gains]
    places = (batch, key_heads, length)
    dtypes = (caches[0].dtype,) * 2 + (torch.float32,) * 2
    rows = zip(caches[:kept], dtypes, (head_dim, head_dim, 1, 1), strict=False)
    wanted += [("cache", cache, dtype, {(*places, size)}) for cache, dtype, size in rows]
    turned = {(n, tokens, 1, head_dim) for n in (1, batch)}
    wanted += [
        ("cosines", cosines, torch.float32, turned),
        ("sines", sines, torch.float32, turned),
        ("mask", mask, torch.bool, {(n, tokens, length) for n in (1, batch)}),
        ("index", index, torch.int32, {(), (1,)}),
    ]
    torch_operators.check(x.device, wanted)
    for tensors, step in ((weights, count), (caches, kept)):
        kinds = [
            t if t is None else (t.shape, t.dtype, t.device, t.is_contiguous()) for t in tensors
        ]
        if any(kinds[i : i + step] != kinds[:step] for i in range(step, len(kinds), step)):
            raise ValueError("The tensors of every block must have the shapes of the first one's.")


torch_operators.define(_SCHEMA, _launch, "CUDA", torch_operators.fake_like)
