"""Two gloo processes on the CPU that share one model."""

import copy

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from hasten.nn import ConvNet, dit, unet
from hasten.nn.sharding import shard


def _gradients(model: nn.Module, rows: slice) -> dict[str, torch.Tensor]:
    """Of a mean over ``rows`` of the same eight images, gathered where they are sharded."""
    images = torch.randn(8, 1, 8, 8, generator=torch.Generator().manual_seed(1))[rows]
    steps = torch.arange(8)[rows] * 100
    out = model(images) if isinstance(model, ConvNet) else model(images, steps).sample
    out.square().mean().backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    return {name: g.full_tensor() if isinstance(g, DTensor) else g for name, g in gradients.items()}


def _model(kind: str) -> nn.Module:
    torch.manual_seed(0)
    if kind == "dit":
        model = dit(1, 8, patch_size=2, width=32, depth=2, heads=2)
        for parameter in model.parameters():  # a DiT begins with zeros, where gradients would be zero too
            nn.init.normal_(parameter, std=0.1)
        return model
    return ConvNet(1, 8, 10, width=8, depth=2) if kind == "convnet" else unet(1, 8, widths=(8, 16))


def _rank(kind: str) -> None:
    model = _model(kind)
    joined = _gradients(copy.deepcopy(model), slice(None))
    # the axes as Lightning's ModelParallelStrategy lays them on one node
    mesh = init_device_mesh("cpu", (1, 2), mesh_dim_names=("data_parallel", "tensor_parallel"))
    shard(model, mesh)
    shard(model, mesh)  # as Lightning does before each of fit, validate and test
    parts = [parameter for parameter in model.parameters() if isinstance(parameter, DTensor)]
    if not parts or any(2 * part.to_local().shape[0] > part.shape[0] + 1 for part in parts):
        raise AssertionError("expected every parameter in two halves")
    for name, gradient in _gradients(model, slice(dist.get_rank(), None, 2)).items():
        torch.testing.assert_close(gradient, joined[name], rtol=1e-4, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["convnet", "unet", "dit"])
def test_two_ranks_have_half_of_each_parameter_and_the_gradients_of_the_joined_batch(kind, two_processes):
    two_processes(_rank, kind)
