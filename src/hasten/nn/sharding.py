"""Fully sharded parameters (FSDP2), asked for by Lightning's ModelParallelStrategy."""

from collections.abc import Iterator

from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard

_CALLED_TWICE = "transformer_blocks.0.norm1.emb"
"""In diffusers' DiT: by its block, and once more behind the last one, where that block is no longer whole."""


def shard(model: nn.Module, mesh: DeviceMesh) -> None:
    """Shard ``model`` in place over all ranks of ``mesh``: each block of its lists alone, then the rest.

    A block's parameters are whole on a rank during its own forward and backward only. To be called in
    ``configure_model``, before the optimizer is built.
    """
    if isinstance(model, FSDPModule):
        return  # Lightning configures the model again before each of fit, validate and test
    # Lightning's mesh lays the devices of a node along its tensor-parallel axis, and nothing here is tensor-parallel
    ranks = init_device_mesh(mesh.device_type, (mesh.size(),))
    for name, part in model.named_modules():
        if name.endswith(_CALLED_TWICE):
            fully_shard(part, mesh=ranks)
    for block in _blocks(model):
        fully_shard(block, mesh=ranks)
    fully_shard(model, mesh=ranks)


def _blocks(module: nn.Module) -> Iterator[nn.Module]:
    """The members of the outermost ModuleLists and Sequentials that hold parameters."""
    for child in module.children():
        if isinstance(child, (nn.ModuleList, nn.Sequential)):
            yield from (block for block in child if next(block.parameters(), None) is not None)
        else:
            yield from _blocks(child)
