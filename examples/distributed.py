"""Train one ternary model in several processes with PyTorch, its weights whole or sharded.

    KERAS_BACKEND=torch python examples/distributed.py [--processes 2] [--device cuda] [--sharded]

Every process sees its share of each batch, and the losses are those of one process with whole
batches. The processes are on the CPU of one machine, or each has a GPU of its own; under `torchrun`
leave `torch.multiprocessing` out. docs/distributed.md has the other ways.
"""

import argparse
import os
import socket

os.environ["KERAS_BACKEND"] = "torch"

import keras
import numpy as np
import torch
import torch.distributed
import torch.multiprocessing
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import keras_bitnet
from keras_bitnet.layers import BitLinear

STEPS, BATCH = 5, 64


def make_model():
    keras.utils.set_random_seed(0)  # the same weights in every process
    head = {"norm": "rms", "weight_quantizer": "int4", "activation_quantizer": None}
    return keras.Sequential(
        [keras.Input((32,)), BitLinear(64, "relu", name="wide"), BitLinear(16, name="head", **head)]
    )


def train(rank, processes, port, device, sharded, results):
    """One process; the first puts its losses and outputs into `results`."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "nccl" if device == "cuda" else "gloo",
        init_method=f"tcp://127.0.0.1:{port}",
        rank=rank,
        world_size=processes,
    )
    if device == "cuda":
        torch.cuda.set_device(rank)
    with keras.device(f"cuda:{rank}" if device == "cuda" else "cpu"):
        model = make_model()
        if sharded:
            shard(model, init_device_mesh(device, (processes,)))
            losses = fit(model, rank, processes)
            model.unshard()
            take_parameters(model)
        else:
            losses = fit(DistributedDataParallel(model), rank, processes)
        if rank == 0:
            results.put((losses, outputs(model)))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def shard(model, mesh):
    """Spreads the trained weights, their gradients and the optimizer's state over the processes.

    FSDP2 takes no scalars, such as the strength of the quantization: what is not trained stays
    whole. It replaces the parameters of a module, so before each forward pass the layers take them.
    """
    fully_shard(model, mesh=mesh, ignored_params={v.value for v in model.non_trainable_variables})
    model.register_forward_pre_hook(take_parameters)


def take_parameters(model, inputs=None):
    """Lets the variables of a Keras model hold the parameters of its PyTorch module."""
    for variable in model.trainable_variables:
        variable._value = model._torch_params[variable.path]


def data():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(BATCH, 32)), rng.normal(size=(BATCH, 16))
    return [keras.ops.convert_to_tensor(array, "float32") for array in (x, y)]


def fit(parallel, rank, processes):
    """A plain PyTorch loop over the share of this process; the losses of whole batches."""
    optimizer = torch.optim.SGD(parallel.parameters(), lr=0.1)
    x, y = (part.chunk(processes)[rank] for part in data())
    losses = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = torch.nn.functional.mse_loss(parallel(x), y)
        loss.backward()
        optimizer.step()
        mean = loss.detach() / processes
        if processes > 1:
            torch.distributed.all_reduce(mean)
        losses.append(float(mean))
    return losses


def outputs(model):
    """What the trained model computes: as trained, and packed."""
    x, _ = data()
    packed = keras_bitnet.pack_model(model, verbose=0)
    return [keras.ops.convert_to_numpy(m(x)) for m in (model, packed)]


def run(processes, device="cpu", sharded=False):
    """Trains in several processes; `(losses, [outputs, outputs when packed])`."""
    if processes == 1:
        with keras.device(device):
            model = make_model()
            return fit(model, 0, 1), outputs(model)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    results = torch.multiprocessing.get_context("spawn").SimpleQueue()
    torch.multiprocessing.spawn(train, (processes, port, device, sharded, results), processes)
    return results.get()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--sharded", action="store_true")
    options = parser.parse_args()
    alone = run(1, options.device)
    together = run(options.processes, options.device, options.sharded)
    print("losses of one process:", [round(loss, 4) for loss in alone[0]])
    print(f"losses of {options.processes}:", [round(loss, 4) for loss in together[0]])
    print("largest difference of outputs:", np.abs(alone[1][0] - together[1][0]).max())
    print("packed from trained:", np.abs(together[1][1] - together[1][0]).max())
