"""What a run will write, where, and how much of it."""

from collections.abc import Iterator
from pathlib import Path

from lightning.pytorch.callbacks import Checkpoint
from omegaconf import DictConfig

from hasten.callbacks import SaveTrajectory
from hasten.estimate.cost import Cost
from hasten.estimate.nodes import HOUSEKEEPING, is_a, kept_epochs
from hasten.loggers import MetricsFile
from hasten.memory import as_size


def writes_of(cfg: DictConfig, cost: Cost) -> dict[str, str]:
    """File or folder, relative to the run's own -> its size, or who writes there and when."""
    writes: dict[str, list[str]] = {"config.yaml, result.json": []}
    for group in ("logger", "callbacks"):
        for name, node in (cfg.get(group) or {}).items():
            if node is not None:
                for path, said in _written_by(cfg, str(name), node, cost):
                    writes.setdefault(path, []).append(said)
    return {path: ", ".join(dict.fromkeys(said)) for path, said in writes.items()}


def _written_by(cfg: DictConfig, name: str, node: DictConfig, cost: Cost) -> Iterator[tuple[str, str]]:
    if is_a(node, (Checkpoint,)):
        folder = Path(str(node.get("dirpath") or cfg.run_dir))
        filename = "last" if node.get("save_last") else node.get("filename") or "*"
        if cost.checkpoint_bytes is not None:
            yield _relative(folder / f"{filename}.ckpt", cfg), as_size(cost.checkpoint_bytes)
    elif is_a(node, (SaveTrajectory,)):
        size = as_size(4 * (kept_epochs(cfg, node) + 1) * cost.parameters)  # float32
        yield _relative(Path(node.path, "expert_*.safetensors"), cfg), f"{cost.experts} files of {size}"
    elif is_a(node, (MetricsFile,)):
        yield _relative(Path(node.folder, "metrics.csv"), cfg), f"a row every {cfg.trainer.log_every_n_steps} steps"
    elif not is_a(node, HOUSEKEEPING):
        for key in ("folder", "path", "save_dir"):
            if str(node.get(key) or "").startswith(str(cfg.run_dir)):
                when = cost.tools.get(name)
                folder = Path(str(node[key]))
                if folder == Path(cfg.run_dir):  # a logger makes one of its own in it
                    folder /= name
                yield f"{_relative(folder, cfg)}/", f"{name} ({when})" if when else name


def _relative(path: Path, cfg: DictConfig) -> str:
    return path.relative_to(cfg.run_dir).as_posix() if path.is_relative_to(cfg.run_dir) else str(path)
