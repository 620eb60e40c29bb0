"""What benchmarks share: images, a feature net and its Frechet distance, facts of the machine, result files, a bar."""

import argparse
import json
import os
import platform
import subprocess
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance

from hasten.formats import whole_file

ROOT = Path(__file__).parents[1]
_FIRST = ("claim", "arm", "seed", "value", "unit", "paper_value")


# ---------------------------------------------------------------------- images


@dataclass(frozen=True)
class Images:
    """A data set in memory: images (N, C, H, W) uint8 and labels (N,) int64, to train on and held out."""

    name: str
    train: Tensor
    train_labels: Tensor
    held_out: Tensor
    held_out_labels: Tensor

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        channels, height, width = self.train.shape[1:]
        return channels, height, width

    @property
    def num_classes(self) -> int:
        return int(self.train_labels.max()) + 1

    def to(self, device: torch.device) -> "Images":
        tensors = (self.train, self.train_labels, self.held_out, self.held_out_labels)
        return Images(self.name, *(tensor.to(device) for tensor in tensors))


def to_float(images: Tensor) -> Tensor:
    """uint8 -> float32 in [-1, 1]."""
    return images.float() / 127.5 - 1


def load_images(data: str, size: int) -> Images:
    """The images of "digits" (8x8, grey, no download) or of a folder with train/ and test/ or val/, a folder a class.

    Args:
        data: "digits" or the folder; its images are cropped to squares and averaged down to ``size``, in colour.
        size: H = W; digits have 8.
    """
    return _digits() if data == "digits" else _folder(Path(data), size)


def data_name(data: str) -> str:
    """What results call the images of ``load_images``: digits, or the folder's own name."""
    return data if data == "digits" else Path(data).resolve().name.replace("-", "_")


def _digits() -> Images:
    from sklearn.datasets import load_digits

    digits: Any = load_digits()
    order = torch.randperm(len(digits.images), generator=torch.Generator().manual_seed(0))
    images = torch.from_numpy(digits.images * 255 / 16).round().to(torch.uint8)[order, None]
    labels = torch.from_numpy(digits.target).long()[order]
    return Images("digits", images[400:], labels[400:], images[:400], labels[:400])


def _folder(root: Path, size: int) -> Images:
    from PIL import Image, ImageOps
    from torchvision.datasets import ImageFolder
    from torchvision.transforms.v2.functional import pil_to_tensor

    held_out = next((name for name in ("test", "val") if (root / name).is_dir()), None)
    if held_out is None or not (root / "train").is_dir():
        raise SystemExit(f"{root.name}: expected a folder with train/ and test/ or val/ in it, got none; pass digits")

    def squared(image: Image.Image) -> Tensor:
        return pil_to_tensor(ImageOps.fit(image, (size, size), Image.Resampling.BOX))

    parts = []
    for name in ("train", held_out):
        folder = ImageFolder(root / name, transform=squared)
        images = torch.stack([image for image, _ in folder])
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))  # folders come class by class
        parts += [images[order], torch.tensor(folder.targets)[order]]
    return Images(data_name(str(root)), *parts)


# ---------------------------------------------------------------------- distances


def train_classifier(
    net: nn.Module, data: Images, *, steps: int, batch: int = 128, lr: float = 3e-3, flip: bool = False
) -> None:
    """Train by AdamW with one cycle of the learning rate, always on the same draws."""
    device = data.train.device
    generator = torch.Generator(device).manual_seed(0)
    optimizer = torch.optim.AdamW(net.parameters(), lr, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps)
    net.train()
    for _ in range(steps):
        index = torch.randint(len(data.train), (batch,), generator=generator, device=device)
        x = to_float(data.train[index])
        if flip:
            x = mirrored(x, generator)
        with reduced_precision(device):
            loss = F.cross_entropy(net(x), data.train_labels[index], label_smoothing=0.1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    net.eval()


@torch.no_grad()
def held_out_accuracy(net: nn.Module, data: Images) -> float:
    """The share of held-out images that are given their class."""
    net.eval()
    predicted = torch.cat([net(to_float(x)).argmax(1) for x in data.held_out.split(500)])
    return (predicted == data.held_out_labels).float().mean().item()


def frechet_distance_to(real: Tensor, net: nn.Module) -> Callable[[Tensor], float]:
    """A function from images (n, C, H, W) to their Frechet distance to ``real``, in the features of ``net``.

    Not an FID: that is the distance in one particular Inception net. Compare at equal n only; it falls with n.
    """
    net = net.eval().requires_grad_(False)
    _, channels, height, width = real.shape
    metric = FrechetInceptionDistance(
        net, normalize=True, input_img_size=(channels, height, width), reset_real_features=False
    ).to(real.device)
    for images in real.split(256):
        metric.update(images, real=True)

    def distance(images: Tensor) -> float:
        metric.reset()
        for part in images.split(256):
            metric.update(part, real=False)
        return metric.compute().item()

    return distance


def mirrored(x: Tensor, generator: torch.Generator) -> Tensor:
    """Every second image, at random, turned left to right."""
    turned = torch.rand(len(x), 1, 1, 1, generator=generator, device=x.device) < 0.5
    return torch.where(turned, x.flip(3), x)


def reduced_precision(device: torch.device) -> torch.autocast:
    """bfloat16 on a GPU, float32 on a CPU."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")


# ---------------------------------------------------------------------- results


class Results:
    """A result file: the protocol, and one row a number; whole on disk after every ``add``.

    A file that is there already is continued if it was measured by the same protocol.
    """

    def __init__(self, path: Path, protocol: dict[str, Any], command: str, *, fresh: bool = False) -> None:
        self.path = path
        self.protocol = json.loads(json.dumps(protocol))
        self.rows: list[dict[str, Any]] = []
        self._facts = {"machine": machine(), "versions": versions(), "commit": commit(), "command": command}
        if path.exists() and not fresh:
            self._continue(json.loads(path.read_text(encoding="utf-8")))

    def _continue(self, found: dict[str, Any]) -> None:
        if found["protocol"] != self.protocol:
            keys = [key for key in self.protocol if self.protocol[key] != found["protocol"].get(key)]
            raise SystemExit(
                f"{self.path.name}: holds results of another protocol ({', '.join(keys)}); "
                "pass --fresh to replace them, or --out FOLDER to keep both"
            )
        self.rows = found["rows"]

    def add(self, *rows: dict[str, Any]) -> None:
        """Add rows {claim, arm, seed, value, unit, ...} in place of those with the same claim, arm, seed and step."""
        rows = tuple({**dict.fromkeys(_FIRST), **row, **self._facts} for row in rows)
        replaced = {_key(row) for row in rows}
        self.rows = [row for row in self.rows if _key(row) not in replaced] + list(rows)
        # a row a line: readable in a diff
        protocol = ",\n".join(f"    {json.dumps(key)}: {json.dumps(value)}" for key, value in self.protocol.items())
        lines = ",\n".join(f"    {json.dumps(row)}" for row in self.rows)
        text = f'{{\n  "protocol": {{\n{protocol}\n  }},\n  "rows": [\n{lines}\n  ]\n}}\n'
        with whole_file(self.path) as unfinished:
            unfinished.write_text(text, encoding="utf-8")

    def select(self, **wanted: Any) -> list[dict[str, Any]]:
        """The rows in which all these keys have these values."""
        return [row for row in self.rows if all(row.get(key) == value for key, value in wanted.items())]


def machine() -> dict[str, Any]:
    """Where it was measured, and nothing of whose machine it is."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {"cpu": _cpu_model(), "cores": os.cpu_count(), "gpu": gpu}


def versions() -> dict[str, str]:
    """What was measured, and by what; peers where they are installed."""
    found = {"python": platform.python_version()}
    peers = ("triton", "mamba-ssm", "mambapy", "hyperlight")
    for name in ("hasten", "torch", "diffusers", "torchmetrics", "timm", *peers):
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def commit() -> str:
    """The commit that was measured, with "-dirty" where the tree differs from it."""
    described = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    return described.stdout.strip() or "unknown"


def argument_parser(doc: str) -> argparse.ArgumentParser:
    """The options that every benchmark has."""
    parser = argparse.ArgumentParser(
        description=doc.partition("\n")[0], epilog="The docstring of this file says how it is measured."
    )
    parser.add_argument("--out", type=Path, help="folder of the results; default: benchmarks/results")
    parser.add_argument("--fresh", action="store_true", help="forget what is in the result file")
    parser.add_argument("--check", action="store_true", help="exit with 1 where a claim does not hold")
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes, to see that it works; into runs/dry_run")
    return parser


def result_path(options: argparse.Namespace, name: str) -> Path:
    """Where the results of these options belong."""
    default = ROOT / "runs" / "dry_run" if options.dry_run else ROOT / "benchmarks" / "results"
    return (options.out or default) / f"{name}.json"


def command(script: str, arguments: Iterable[str]) -> str:
    """The command line as another person would type it: folders by their last name."""
    return " ".join(["python", f"benchmarks/{Path(script).name}", *(Path(word).name or word for word in arguments)])


def progress_bar() -> Progress:
    """Steps done, and the time left."""
    columns = (TextColumn("{task.description:22}"), BarColumn(), MofNCompleteColumn())
    return Progress(*columns, TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn())


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table as GitHub renders it."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _key(row: dict[str, Any]) -> tuple[Any, ...]:
    return row["claim"], row["arm"], row["seed"], row.get("step")


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
