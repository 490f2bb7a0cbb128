"""Peers of `cpu_matmul.py`: each gives `(call, weight, tolerance)` for a case, or says why not.

`call(m, i)` runs the i-th copy of the weights on the activations of m rows and returns
`(seconds, y)`. They compress the same float weight in their own way: `weight` is what it stands
for then, and the tolerance is that of 8-bit activations.
"""

import ctypes
import functools
import importlib.util
import os
import pathlib
import time
import weakref

import numpy as np
from common import Skip, peer


def torch_onednn_int8(case):
    """8-bit weights and dynamic 8-bit activations in PyTorch's oneDNN linear."""
    torch = peer("torch")
    if "onednn" not in torch.backends.quantized.supported_engines:
        raise Skip("this PyTorch has no oneDNN engine")
    torch.backends.quantized.engine = "onednn"
    weight = torch.from_numpy(case.weight.T.copy())
    scales = weight.abs().amax(1) / 127
    zeros = torch.zeros(case.n, dtype=torch.int64)
    quantized = torch.quantize_per_channel(weight, scales, zeros, 0, torch.qint8)
    count = case.copies(case.k * case.n)
    packed = [torch.ops.quantized.linear_prepack(quantized, None) for _ in range(count)]
    x = {m: torch.from_numpy(value) for m, value in case.x.items()}

    def call(m, i):
        with torch.inference_mode():
            begin = time.perf_counter()
            y = torch.ops.quantized.linear_dynamic(x[m], packed[i % count])
            return time.perf_counter() - begin, y.numpy()

    return call, case.weight, 0.05


def openvino_u2(case):
    """2-bit weights in groups of 128 and dynamic 8-bit activations in OpenVINO."""
    ov = peer("openvino")
    import openvino.opset13 as ops

    size = 128
    if case.k % size:
        raise Skip(f"in_features is not a multiple of {size}")
    groups = case.weight.T.reshape(case.n, -1, size)
    scale = np.abs(groups).mean(-1, keepdims=True)
    codes = (np.clip(np.rint(groups / scale), -1, 1) + 1).astype(np.uint8)
    packed = ov.Tensor(ov.Type.u2, codes.shape)
    fields = codes.reshape(-1, 4) << np.array([0, 2, 4, 6], np.uint8)
    packed.data.reshape(-1)[:] = np.bitwise_or.reduce(fields, axis=1)
    centred = ops.subtract(ops.convert(ops.constant(packed), "f32"), np.ones(1, np.float32))
    weight = ops.multiply(centred, ops.constant(scale.astype(np.float32)))
    weight = ops.reshape(weight, [case.n, case.k], False)
    x = ops.parameter([-1, case.k], np.float32)
    model = ov.Model([ops.matmul(x, weight, False, True)], [x])
    options = {
        "INFERENCE_NUM_THREADS": len(os.sched_getaffinity(0)), "NUM_STREAMS": 1,
        "INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": size,
    }  # fmt: skip
    count = min(case.copies(case.k * case.n // 4), 24)  # a compiled model each
    core = ov.Core()
    requests = [
        core.compile_model(model.clone(), "CPU", options).create_infer_request()
        for _ in range(count)
    ]

    def call(m, i):
        request = requests[i % count]
        begin = time.perf_counter()
        y = request.infer([case.x[m]], share_inputs=True, share_outputs=True)[0]
        return time.perf_counter() - begin, y

    for m in case.x:  # a request compiles for each new shape
        for i in range(count):
            call(m, i)
    return call, ((codes - 1.0) * scale).reshape(case.n, case.k).T, 0.05


def onnxruntime_int4(case):
    """4-bit weights in blocks of 32 and 8-bit activations: `MatMulNBits` of ONNX Runtime."""
    ort, onnx = peer("onnxruntime"), peer("onnx")
    size = 32
    groups = case.weight.T.reshape(case.n, -1, size)
    scale = np.abs(groups).max(-1) / 7
    codes = (np.clip(np.rint(groups / scale[..., None]), -7, 7) + 8).astype(np.uint8)
    packed = codes[..., 0::2] | (codes[..., 1::2] << 4)
    helper, numpy_helper = onnx.helper, onnx.numpy_helper
    node = helper.make_node(
        "MatMulNBits", ["x", "b", "s"], ["y"], domain="com.microsoft", K=case.k, N=case.n,
        bits=4, block_size=size, accuracy_level=4,
    )  # fmt: skip
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        [node], "peer",
        [value("x", onnx.TensorProto.FLOAT, ["m", case.k])],
        [value("y", onnx.TensorProto.FLOAT, ["m", case.n])],
        [numpy_helper.from_array(packed, "b"),
         numpy_helper.from_array(scale.astype(np.float32).reshape(-1), "s")],
    )  # fmt: skip
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=9).SerializeToString()
    options = ort.SessionOptions()
    options.intra_op_num_threads = len(os.sched_getaffinity(0))
    count = case.copies(case.k * case.n // 2)
    sessions = [
        ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        for _ in range(count)
    ]

    def call(m, i):
        begin = time.perf_counter()
        y = sessions[i % count].run(None, {"x": case.x[m]})[0]
        return time.perf_counter() - begin, y

    weight = ((codes - 8.0) * scale[..., None]).reshape(case.n, case.k).T
    return call, weight, 0.05


class _GgmlParams(ctypes.Structure):
    """`struct ggml_init_params`."""

    _fields_ = (
        ("mem_size", ctypes.c_size_t), ("mem_buffer", ctypes.c_void_p), ("no_alloc", ctypes.c_bool)
    )  # fmt: skip


@functools.cache
def _ggml():
    """The libraries of ggml that `llama-cpp-python` ships, and a CPU backend with its own pool."""
    found = importlib.util.find_spec("llama_cpp")
    if found is None:
        raise Skip("llama-cpp-python is not installed")
    folder = pathlib.Path(found.origin).parent / "lib"
    base, cpu = (ctypes.CDLL(str(folder / f"lib{name}.so")) for name in ("ggml-base", "ggml-cpu"))
    pointer, integer = ctypes.c_void_p, ctypes.c_int64
    for name, result, arguments in (
        ("ggml_init", pointer, (_GgmlParams,)),
        ("ggml_new_tensor_2d", pointer, (pointer, ctypes.c_int, integer, integer)),
        ("ggml_mul_mat", pointer, (pointer, pointer, pointer)),
        ("ggml_new_graph", pointer, (pointer,)),
        ("ggml_build_forward_expand", None, (pointer, pointer)),
        ("ggml_get_data", pointer, (pointer,)),
        ("ggml_free", None, (pointer,)),
        ("ggml_quantize_chunk", ctypes.c_size_t,
         (ctypes.c_int, pointer, pointer, integer, integer, integer, pointer)),
        ("ggml_threadpool_params_init", None, (pointer, ctypes.c_int)),
        ("ggml_backend_graph_compute", ctypes.c_int, (pointer, pointer)),
    ):  # fmt: skip
        function = getattr(base, name)
        function.restype, function.argtypes = result, arguments
    threads = len(os.sched_getaffinity(0))
    cpu.ggml_backend_cpu_init.restype = cpu.ggml_threadpool_new.restype = pointer
    cpu.ggml_threadpool_new.argtypes = (pointer,)
    cpu.ggml_backend_cpu_set_n_threads.argtypes = (pointer, ctypes.c_int)
    cpu.ggml_backend_cpu_set_threadpool.argtypes = (pointer, pointer)
    backend = cpu.ggml_backend_cpu_init()
    options = ctypes.create_string_buffer(4096)  # more than the struct needs
    base.ggml_threadpool_params_init(options, threads)
    cpu.ggml_backend_cpu_set_n_threads(backend, threads)
    pool = cpu.ggml_threadpool_new(options)
    cpu.ggml_backend_cpu_set_threadpool(backend, pool)
    cpu.ggml_threadpool_pause.argtypes = cpu.ggml_threadpool_resume.argtypes = (pointer,)
    return base, cpu, backend, pool


def ggml(case, kind):
    """Ternary weights of ggml: `kind` is the number of TQ1_0 (34) or TQ2_0 (35)."""
    if case.k % 256:
        raise Skip("in_features is not a multiple of 256")
    base, cpu, backend, pool = _ggml()
    scale = np.abs(case.weight).mean()
    codes = np.ascontiguousarray(np.clip(np.rint(case.weight.T / scale), -1, 1), np.float32)
    count = case.copies(case.k * case.n // 4)
    rows = sum(case.x)
    room = count * (case.k * case.n // 3 + 4 * rows * (case.k + case.n) + (1 << 20)) + (1 << 24)
    context = base.ggml_init(_GgmlParams(room, None, False))
    graphs = {}
    for i in range(count):
        weight = base.ggml_new_tensor_2d(context, kind, case.k, case.n)
        at = base.ggml_get_data(weight)
        base.ggml_quantize_chunk(kind, codes.ctypes.data, at, 0, case.n, case.k, None)
        for m, value in case.x.items():
            x = base.ggml_new_tensor_2d(context, 0, case.k, m)
            ctypes.memmove(base.ggml_get_data(x), value.ctypes.data, value.nbytes)
            y = base.ggml_mul_mat(context, weight, x)
            graph = base.ggml_new_graph(context)
            base.ggml_build_forward_expand(graph, y)
            data = ctypes.cast(base.ggml_get_data(y), ctypes.POINTER(ctypes.c_float))
            graphs[m, i] = graph, np.ctypeslib.as_array(data, (m, case.n))

    def call(m, i):
        graph, y = graphs[m, i % count]
        cpu.ggml_threadpool_resume(pool)
        time.sleep(2e-4)  # its threads are up, and spin
        begin = time.perf_counter()
        base.ggml_backend_graph_compute(backend, graph)
        seconds = time.perf_counter() - begin
        cpu.ggml_threadpool_pause(pool)  # or they would spin through the calls of the others
        return seconds, y

    weakref.finalize(call, base.ggml_free, context)
    return call, codes.T, 0.05


PEERS = {
    "ggml TQ2_0": lambda case: ggml(case, 35),
    "ggml TQ1_0": lambda case: ggml(case, 34),
    "torch oneDNN int8": torch_onednn_int8,
    "OpenVINO u2": openvino_u2,
    "ONNX Runtime int4": onnxruntime_int4,
}
