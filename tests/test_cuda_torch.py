"""The CUDA kernels under PyTorch: compilation, graphs, streams, every matrix kernel."""

import dataclasses

import numpy as np
import pytest
from helpers import BACKEND, relative_error

if BACKEND != "torch":
    pytest.skip("the torch backend is not the active one", allow_module_level=True)

import keras
import torch
from test_native_adapters import OFFSETS, make_packed, packed_layer

from keras_bitnet import kernels
from keras_bitnet.kernels.cuda import library
from keras_bitnet.ops import PackedTensor, bit_matmul, layout
from keras_bitnet.quantizers.activations import ActivationInt8

if library.reason(0) is not None:
    pytest.skip(library.reason(0), allow_module_level=True)

MATRIX_KERNELS = range(1, 12)  # rows of the table in matmul.cc
GROUPED = (5, 6, 7)
WIDE = {False: (12, 13), True: (14, 15)}  # of float activations of 16 bits; whether in groups


def product(x, packed, kernel, activation_bits=8):
    """The product by one of `MATRIX_KERNELS`."""
    from keras_bitnet.kernels.cuda import torch as adapter

    tensors = x, packed.tiles, packed.scale, None, None
    sizes = packed.out_features, packed.bits, packed.group_size or 0
    return adapter._launch(
        *tensors, *sizes, activation_bits, False, packed.offset, 1e-5, kernel=kernel
    )


def with_scale_1(tiles, in_features, out_features, bits=2):
    return PackedTensor(
        tiles, torch.ones(1, 1, device="cuda"), -1.0, bits, in_features, out_features
    )


@pytest.mark.parametrize("rows", [2, 11, 100, 257])
@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_every_matrix_kernel(bits, rows, rng):
    # Of the most inputs every block of a cluster has some.
    for k, n in ((40, 20), (1000, 132), (2304, 528), (9000, 130)):
        for kernel in MATRIX_KERNELS:
            if "wgmma" in _name(kernel) and torch.cuda.get_device_capability() != (9, 0):
                continue
            for granularity in (128, 192) if kernel in GROUPED else ("channel",):
                _, packed = make_packed(rng, k, n, bits, granularity)
                x = torch.randn(rows, k, device="cuda")
                with kernels.use_kernel("reference"):
                    wanted = {8: bit_matmul(x, packed, ActivationInt8())}
                wanted[0] = x.double() @ packed.dequantize().double()
                for activation_bits in wanted:
                    y = product(x, packed, kernel, activation_bits)
                    error = relative_error(y.cpu(), wanted[activation_bits].cpu())
                    assert error < 2e-6, (_name(kernel), k, n, granularity, activation_bits)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("group_size", [None, 32, 96, 128])
@pytest.mark.parametrize(("bits", "offset"), [(b, o) for b in OFFSETS for o in OFFSETS[b]])
def test_every_kernel_of_16_bits(bits, offset, group_size, dtype, rng):
    """They are right to the rounding of float32, and the same from call to call."""
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("no such kernel multiplies on this GPU")
    if group_size and group_size % (128 // bits):
        pytest.skip("the kernel of single rows takes groups of so few inputs")
    for m, k, n in ((2, 40, 20), (70, 1000, 132), (257, 384, 528), (130, 9000, 130)):
        _, packed = make_packed(rng, k, n, bits, group_size or "channel", offset)
        packed = dataclasses.replace(packed, scale=with_nan_behind(packed.scale))
        x = torch.randn(m, k, device="cuda") * 10.0 ** torch.randint(-4, 0, (m, 1), device="cuda")
        x = x.to(getattr(torch, dtype))
        for kernel in WIDE[group_size is not None]:
            y = product(x, packed, kernel, 0)
            assert_close(y, x, packed.dequantize())
            assert all(torch.equal(product(x, packed, kernel, 0), y) for _ in range(5))


def with_nan_behind(v):
    """The same values; what is read behind them shows."""
    memory = torch.full((len(v) + 4, *v.shape[1:]), torch.nan, device="cuda")
    memory[: len(v)] = v
    return memory[: len(v)]


def assert_close(y, x, weight):
    x, weight = x.double(), weight.double()
    wanted, largest = x @ weight, x.abs() @ weight.abs()
    rounding, least = {torch.bfloat16: (2.0**-8, 0), torch.float16: (2.0**-11, 2.0**-25)}[y.dtype]
    assert ((y - wanted).abs() <= rounding * wanted.abs() + 2e-6 * largest + least).all()


@pytest.mark.parametrize("kernel", WIDE[True])
def test_scales_of_groups_that_differ_much(kernel, rng):
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("no such kernel multiplies on this GPU")
    _, packed = make_packed(rng, 1024, 256, 4, 32)
    scale = torch.exp2(torch.randint_like(packed.scale, -25, 26))
    scale[torch.rand_like(scale) < 0.2] = 0
    scale[0, :50], scale[:, 7], scale[-1, 50:100] = 0, 0, 0
    scale[:, 9] *= -1
    packed.scale.copy_(scale)
    x = torch.randn(100, 1024, device="cuda").bfloat16()
    assert_close(product(x, packed, kernel, 0), x, packed.dequantize())


def test_16_bits_hold_the_weights(rng):
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("no such kernel multiplies on this GPU")
    _, packed = make_packed(rng, 256, 256, 8, "channel", -100.0)
    x = torch.randn(300, 256, device="cuda").bfloat16()
    y, wanted = bit_matmul(x, packed, None), x.double() @ packed.dequantize().double()
    assert relative_error(y.double().cpu(), wanted.cpu()) < 8e-3
    with pytest.raises(RuntimeError, match="16 bits do not hold"):
        product(x, packed, WIDE[False][0], 0)
    with pytest.raises(RuntimeError, match="16 bits that stay float"):
        product(x, packed, WIDE[False][0], 8)


def _name(kernel):
    return "wgmma" if kernel > 7 else "mma"


@pytest.mark.parametrize("out_features", [130, 6000, 12000])  # clusters of 8, 4 and 2 on 132 SMs
def test_blocks_that_share_inputs(out_features, rng):
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("no cluster of blocks multiplies on this GPU")
    *shared, alone = 8, 9, 10, 11  # the last one has no memory for sums of other blocks
    shape = layout.tiles_shape(4200, out_features, 2)
    tiles = torch.randint(0, 256, shape, dtype=torch.uint8, device="cuda")
    packed = with_scale_1(tiles, 4200, out_features)
    for rows in (5, 33, 130):
        x = torch.randn(rows, 4200, device="cuda")
        y = {kernel: [product(x, packed, kernel) for _ in range(20)] for kernel in (alone, *shared)}
        for kernel in shared:
            assert all(torch.equal(found, y[alone][0]) for found in y[kernel]), (kernel, rows)


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_blocks_that_take_many_slices_alone(bits):
    """Of so many outputs the blocks of 64 rows share no inputs, and have a kernel of their own."""
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("there is no such kernel for this GPU")
    for k, n in ((4100, 40000), (8192, 20000)):
        tiles = torch.randint(
            0, 256, layout.tiles_shape(k, n, bits), dtype=torch.uint8, device="cuda"
        )
        packed = with_scale_1(tiles, k, n, bits)
        for rows in (33, 64, 100):
            x = torch.randn(rows, k, device="cuda").bfloat16()
            assert torch.equal(product(x, packed, 10), product(x, packed, 11)), (k, n, rows)


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_single_rows_of_many_turns(bits):
    for k, n in ((14332, 4096), (14336, 4090), (8190, 8192), (4100, 14330)):
        tiles = torch.randint(
            0, 256, layout.tiles_shape(k, n, bits), dtype=torch.uint8, device="cuda"
        )
        packed = with_scale_1(tiles, k, n, bits)
        x = torch.randn(2, k, device="cuda").bfloat16()
        wanted = product(x, packed, 1)
        for _ in range(3):  # the first one waits for the weights
            assert torch.equal(product(x[:1], packed, 0)[0], wanted[0]), (k, n)


@pytest.mark.parametrize("bits", [2, 4])
def test_narrow_blocks_in_the_last_wave(bits, rng):
    """Those of 128 rows; on 132 SMs the first sizes have some."""
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("these kernels are for compute capability 9.0")

    def random_weight(k, n):
        shape = layout.tiles_shape(k, n, bits)
        tiles = torch.randint(0, 256, shape, dtype=torch.uint8, device="cuda")
        return with_scale_1(tiles, k, n, bits)

    for rows, n in ((300, 12000), (200, 17100), (1000, 4401), (128, 40000), (257, 600)):
        packed = random_weight(300, n)
        x = torch.randn(rows, 300, device="cuda")
        of_64, of_128 = (product(x, packed, kernel) for kernel in (10, 11))
        assert torch.equal(of_128, of_64), (rows, n)
    weights = [random_weight(4096, n) for n in (9000, 33, 8000)]
    x = torch.randn(200, 4096, device="cuda")
    shared = bits, 0, 8, False, -1.0, 1e-5
    sizes = [w.out_features for w in weights]
    found = _joint(3, x, weights, [None] * 3, *sizes, *shared)
    for y, w in zip(found, weights, strict=True):
        assert torch.equal(y, product(x, w, 10))


@pytest.mark.parametrize("activation_bits", [8, 4, 0])
@pytest.mark.parametrize("group_size", [None, 32, 128])
@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_products_of_the_same_activations(bits, group_size, activation_bits, rng):
    """They are those of one weight after another, bit for bit where the sums are of integers."""
    for k, sizes in ((260, (33, 100)), (520, (300, 16, 7)), (1000, (640, 64, 64, 640))):
        weights = [make_packed(rng, k, n, bits, group_size or "channel")[1] for n in sizes]
        biases = [torch.randn(n, device="cuda") if i % 2 else None for i, n in enumerate(sizes)]
        for rows in (0, 1, 3, 20, 70, 300):
            for dtype in (torch.float32, torch.bfloat16):
                x = torch.randn(rows, k, device="cuda").to(dtype)
                shared = bits, group_size or 0, activation_bits, False, weights[0].offset, 1e-5
                found = _joint(len(sizes), x, weights, biases, *sizes, *shared)
                for y, w, bias, n in zip(found, weights, biases, sizes, strict=True):
                    wanted = _joint(1, x, [w], [bias], n, *shared)
                    assert y.shape == (rows, n)
                    if activation_bits and not group_size:
                        assert torch.equal(y, wanted)
                    elif rows:
                        error = relative_error(y.float().cpu(), wanted.float().cpu())
                        assert error < (1e-2 if dtype == torch.bfloat16 else 2e-6)


def _joint(count, x, weights, biases, *others):
    from keras_bitnet.kernels.cuda import torch as adapter

    operator = getattr(torch.ops.keras_bitnet, adapter._NAMES[count])
    tensors = ((w.tiles, w.scale, b) for w, b in zip(weights, biases, strict=True))
    return operator(x, *(tensor for weight in tensors for tensor in weight), None, *others)


def test_operators_of_the_same_activations(rng):
    from keras_bitnet.kernels.cuda import torch as adapter

    weights = [make_packed(rng, 100, n)[1] for n in (33, 50)]
    x = torch.randn(2, 5, 100, device="cuda").requires_grad_()
    biases = [torch.randn(33, device="cuda").requires_grad_(), None]
    tensors = (t for w, b in zip(weights, biases, strict=True) for t in (w.tiles, w.scale, b))
    shared = 2, 0, 8, False, weights[0].offset, 1e-5
    op = getattr(torch.ops.keras_bitnet, adapter._NAMES[2]).default
    torch.library.opcheck(op, (x, *tensors, None, 33, 50, *shared))


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_the_largest_sums(bits):
    # With so many outputs one block sums over all inputs.
    inputs, outputs, rows = 98304, 17000, 40
    shape = layout.tiles_shape(inputs, outputs, bits)
    tiles = torch.full(shape, 255, dtype=torch.uint8, device="cuda")
    packed, x = with_scale_1(tiles, inputs, outputs, bits), torch.ones(rows, inputs, device="cuda")
    wanted = torch.full((rows, outputs), (2.0**bits - 2) * inputs, device="cuda")
    for kernel in MATRIX_KERNELS:
        if kernel in GROUPED or (kernel > 7 and torch.cuda.get_device_capability() != (9, 0)):
            continue
        y = product(x, packed, kernel)
        torch.testing.assert_close(y, wanted, rtol=1e-6, atol=0.1)


@pytest.mark.parametrize("mode", [None, "reduce-overhead"])
def test_compile(mode, rng):
    torch._dynamo.reset()
    layer = packed_layer(rng)
    compiled = torch.compile(layer, fullgraph=True, mode=mode)
    for rows in (1, 5, 40):
        x = torch.randn(rows, 100, device="cuda")
        with torch.no_grad():
            for _ in range(3):
                assert torch.equal(compiled(x).clone(), layer(x))


@pytest.mark.parametrize("rows", [1, 16, 100])
def test_cuda_graph(rows, rng):
    layer = packed_layer(rng, 256, 256)
    x = torch.randn(rows, 256, device="cuda")
    with torch.no_grad():
        layer(x)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = x
            for _ in range(4):
                y = layer(y)
        for _ in range(3):
            x.normal_()
            graph.replay()
            wanted = x
            for _ in range(4):
                wanted = layer(wanted)
            assert torch.equal(y, wanted)


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_cuda_graph_of_a_lookup_and_of_unpacking(bits, rng):
    _, packed = make_packed(rng, 100, 33, bits, "channel")
    tokens = torch.randint(33, (2, 5), device="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        rows, whole = packed.gather(tokens), packed.dequantize()
    tokens.random_(33)
    graph.replay()
    assert torch.equal(rows, packed.gather(tokens))
    assert torch.equal(whole, packed.dequantize())
    compiled = torch.compile(packed.gather, fullgraph=True, mode="reduce-overhead")
    for _ in range(3):
        tokens.random_(33)
        assert torch.equal(compiled(tokens), packed.gather(tokens))


def test_runs_on_the_current_stream(rng):
    _, packed = make_packed(rng, 512, 512)
    x = torch.randn(8, 512, device="cuda")
    wanted = bit_matmul(x, packed, ActivationInt8())
    stream = torch.cuda.Stream()
    late = torch.zeros_like(x)
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        late.copy_(x)
        y = bit_matmul(late, packed, ActivationInt8())
    stream.synchronize()
    assert torch.equal(y, wanted)


def test_weights_written_just_before(rng):
    # A launch may start before the kernel before it ends; it must not read weights too early.
    _, packed = make_packed(rng, 4096, 4096)
    x = torch.randn(1, 4096, device="cuda")
    wanted = bit_matmul(x, packed, ActivationInt8())
    tiles = packed.tiles.clone()
    for turn in range(40):
        packed.tiles.zero_()
        if turn % 2:  # the weights of the launch before are not yet the ones of this
            bit_matmul(x, packed, ActivationInt8())
        packed.tiles.copy_(tiles)
        assert torch.equal(bit_matmul(x, packed, ActivationInt8()), wanted)
        assert torch.equal(bit_matmul(x, packed, ActivationInt8()), wanted)


def test_which_launches_may_read_weights_early(rng):
    from keras_bitnet.kernels.cuda import torch as adapter

    tiles = torch.zeros(4, 16, 16, 4, dtype=torch.uint8, device="cuda")
    unknown, ready, settle = range(3)
    assert [adapter._writers(tiles, 1) for _ in range(3)] == [settle, ready, ready]
    assert [adapter._writers(tiles, 2) for _ in range(2)] == [settle, ready]  # another stream
    tiles.zero_()
    assert [adapter._writers(tiles, 2) for _ in range(2)] == [settle, ready]
    assert adapter._writers(tiles, 1) == settle
    tiles.data = tiles.clone()
    assert adapter._writers(tiles, 1) == settle
    with torch.inference_mode():
        assert adapter._writers(torch.zeros_like(tiles), 1) == unknown
    count = len(adapter._settled)
    del tiles
    assert len(adapter._settled) == count - 1


def test_second_device(rng):
    if torch.cuda.device_count() < 2:
        pytest.skip("there is one GPU")
    _, packed = make_packed(rng, 100, 33)
    x = torch.randn(5, 100, device="cuda:0")
    wanted = bit_matmul(x, packed, ActivationInt8())
    moved = PackedTensor(
        packed.tiles.to("cuda:1"), packed.scale.to("cuda:1"), packed.offset, 2, 100, 33
    )
    with keras.device("cuda:1"):
        assert torch.equal(bit_matmul(x.to("cuda:1"), moved, ActivationInt8()).cpu(), wanted.cpu())


def test_export(rng):
    layer = packed_layer(rng)
    x = torch.randn(5, 100, device="cuda")
    batch = torch.export.Dim("batch")
    program = torch.export.export(layer, (x,), dynamic_shapes=(({0: batch},),))
    assert any("bit_matmul_cuda" in str(node.target) for node in program.graph.nodes)
    assert relative_error(program.module()(x[:3]).detach().cpu(), layer(x[:3]).detach().cpu()) == 0


def test_opcheck(rng):
    _, packed = make_packed(rng, 100, 33)
    x, bias = torch.randn(2, 5, 100, device="cuda"), torch.randn(33, device="cuda")
    op = torch.ops.keras_bitnet.bit_matmul_cuda.default
    tensors = (x.requires_grad_(), packed.tiles, packed.scale, bias.requires_grad_(), None)
    torch.library.opcheck(op, (*tensors, 33, 2, 0, 8, False, packed.offset, 1e-5))


def test_operator_checks_its_operands(rng):
    _, packed = make_packed(rng, 100, 33)
    op = torch.ops.keras_bitnet.bit_matmul_cuda
    x, tensors = torch.randn(5, 50, device="cuda"), (packed.tiles, packed.scale, None, None)
    with pytest.raises(ValueError, match="`tiles` must be"):
        op(x, *tensors, 33, 2, 0, 8, False, packed.offset, 1e-5)


def test_trains_what_is_around_a_packed_layer(rng):
    model = keras.Sequential([keras.Input((100,)), packed_layer(rng, norm="rms")])
    model.compile(keras.optimizers.SGD(0.05), "mse")
    x, y = (rng.normal(size=(64, size)).astype("float32") for size in (100, 33))
    losses = model.fit(x, y, epochs=3, shuffle=False, verbose=0).history["loss"]
    assert losses[-1] < losses[0]
    assert np.isfinite(losses).all()
