"""The front page and the benchmarks' page: what is written there by hand runs, and what is generated is up to date."""

import importlib.util
import re
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler
from lightning import LightningModule
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from hasten import cli
from hasten.datamodules import Digits
from hasten.formats import write_trajectory
from hasten.nn import ConvNet, FlatModel, VisionMamba
from hasten.run import compose

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
SNIPPETS = {
    re.findall(r"^\*(.+)\*:", README[: block.start()], flags=re.MULTILINE)[-1]: block[1]
    for block in re.finditer(r"^```python\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)
}
"""Every Python block, by the italic words before it."""

# Lightning's advice to a datamodule that is fitted by a module without validation
pytestmark = pytest.mark.filterwarnings("ignore:You passed in a `val_dataloader`")


@pytest.fixture(scope="module")
def pages():
    spec = importlib.util.spec_from_file_location("pages", ROOT / "docs" / "pages.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# ------------------------------------------------------------------ what is generated


def test_the_readme_has_the_methods_as_their_cards_have_them(pages):
    assert pages.with_methods(README) == README, "README.md differs from the cards: run `make pages`"


def test_the_benchmarks_page_has_the_results_as_they_were_measured(pages):
    page = (ROOT / "benchmarks" / "README.md").read_text(encoding="utf-8")
    assert page == pages.benchmarks_page(), "benchmarks/README.md differs from results and cards: run `make pages`"


def _row(arm, seed, value, **more):
    facts = {"machine": {"cpu": "C", "cores": 2, "gpu": None}, "versions": {"torch": "2"}, "commit": "a"}
    row = {"claim": "time", "arm": arm, "seed": seed, "value": value, "unit": "ms, minimum", "paper_value": None}
    return row | facts | {"command": "python benchmarks/x.py"} | more


def _cells(table):
    return [line[2:-2].split(" | ") for line in table.splitlines()[2:]]


def test_seeds_are_one_line_with_their_mean_and_deviation(pages):
    rows = [_row("ours", seed, value, unit="accuracy", paper_value=0.9) for seed, value in enumerate([0.5, 0.6, 0.7])]
    expected = ["time", "ours", "0.60 ± 0.10", "accuracy", "-", "0.9", "0, 1, 2", "1"]
    assert _cells(pages.results_table({"rows": rows})) == [expected]


def test_times_stand_beside_their_base_and_rows_of_another_run_say_so(pages):
    rows = [_row("ours", None, 30.0), _row("floor", None, 20.0, commit="b")]
    ours, floor = _cells(pages.results_table({"rows": rows}))
    assert ours == ["time", "ours", "30", "ms, minimum", "1.50x", "-", "-", "1"]
    assert floor[1:] == ["floor", "20", "ms, minimum", "base", "-", "-", "2"]


def test_controls_that_stand_within_a_row_get_a_row_of_their_own(pages):
    rows = [_row("datm", seed, 0.8, unit="fraction", name="datm", metrics={"eval/whole/acc": 0.9}) for seed in (0, 0)]
    assert [line[1:3] for line in _cells(pages.results_table({"rows": rows}))] == [
        ["datm", "0.8"],
        ["all training images", "0.9"],
    ]


# ------------------------------------------------------------------ what is written by hand


class _Denoiser(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 1, 3, padding=1)

    def forward(self, images, timestep):
        return self.conv(images) * timestep[:, None, None, None] / 1000


class _Diffusion(LightningModule):
    """Written like most diffusion training code."""

    def __init__(self, net):
        super().__init__()
        self.net = net
        self.scheduler = DDPMScheduler()

    def training_step(self, batch, batch_idx):
        images, _ = batch
        noise = torch.randn_like(images)
        timesteps = torch.randint(0, 1000, (len(images),), device=images.device)
        return F.mse_loss(self.net(self.scheduler.add_noise(images, noise, timesteps), timesteps), noise)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)

    def train_dataloader(self):
        return DataLoader(TensorDataset(torch.randn(8, 1, 8, 8), torch.arange(8)), batch_size=4)


class _Classifier(_Diffusion):
    def training_step(self, batch, batch_idx):
        images, targets = batch
        return F.cross_entropy(self.net(images), targets)


class _Rotations(_Diffusion):
    """Tells its network by how much the images are turned."""

    def training_step(self, batch, batch_idx):
        images, targets = batch
        return F.cross_entropy(self.net(images.rot90(1, (2, 3)), angle=90.0), targets)


def _vit():
    sizes = {"img_size": 8, "patch_size": 1, "in_chans": 1, "depth": 2, "embed_dim": 12, "num_classes": 10}
    return timm.create_model("vit_tiny_patch16_224", **sizes)


def _mamba():
    return VisionMamba(img_size=8, patch_size=1, in_chans=1, depth=4, embed_dim=8, d_state=2, num_classes=10)


STRANGERS = {
    "your_diffusion_module": lambda: _Diffusion(_Denoiser()),
    "your_classifier": lambda: _Classifier(_vit()),
    "your_module": lambda: _Rotations(ConvNet(1, 8, 10, width=4, depth=1)),
    "your_data": Digits,
}
"""What the snippets take for granted."""


def _experts(folder: Path) -> None:
    """One expert as SaveTrajectory writes it: a network of its own way, from a start to what knows every class."""
    torch.manual_seed(0)
    net, data = ConvNet(1, 8, 10, width=4, depth=1), Digits()
    data.prepare_data()
    data.setup("fit")
    images, labels = data.train_images(torch.arange(1000)), data.train_labels[:1000]
    form, optimizer, way = FlatModel(net), torch.optim.Adam(net.parameters(), lr=0.02), []
    for _ in range(22):
        way.append(torch.cat([p.detach().flatten() for p in net.parameters()]))
        for _ in range(4):
            optimizer.zero_grad()
            F.cross_entropy(net(images), labels).backward()
            optimizer.step()
    accuracies = [0.5] * len(way)
    write_trajectory(
        folder / "expert_0000.safetensors", torch.stack(way), train_acc=accuracies, val_acc=accuracies,
        names=form.names, shapes=form.shapes, recipe={},
    )  # fmt: skip


def _run(snippet, folder, monkeypatch, strangers=STRANGERS):
    """Run a snippet as it stands, two batches of it, and return its names."""
    monkeypatch.chdir(folder)
    settings = {"accelerator": "cpu", "max_epochs": 1, "limit_train_batches": 2, "logger": False}
    settings |= {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    for name, value in settings.items():
        monkeypatch.setenv(f"PL_TRAINER_{name.upper()}", str(value))
    if '"experts"' in snippet:
        folder.joinpath("experts").mkdir()
        _experts(folder / "experts")
    names = {name: make() for name, make in strangers.items() if name in snippet}
    exec(compile(snippet, "README.md", "exec"), names)
    return names


@pytest.mark.parametrize("name", SNIPPETS)
def test_a_snippet_of_the_readme_runs_as_it_stands(name, tmp_path, monkeypatch):
    assert _run(SNIPPETS[name], tmp_path, monkeypatch)["trainer"].global_step == 2


def test_the_snippet_of_token_merging_serves_a_vision_mamba_too(tmp_path, monkeypatch):
    strangers = {"your_classifier": lambda: _Classifier(_mamba())}
    found = _run(SNIPPETS["ToMe and R-MeeTo"], tmp_path, monkeypatch, strangers)
    assert found["trainer"].global_step == 2


@pytest.mark.parametrize("line", re.findall(r"^python train\.py (.+)$", README, flags=re.MULTILINE))
def test_a_run_of_the_readme_composes(line):
    compose([word.partition(",")[0] for word in line.split() if word != "-m"])


@pytest.mark.parametrize("word", sorted(set(re.findall(r"^hasten (\w+)", README, flags=re.MULTILINE))))
def test_a_command_of_the_readme_exists(word):
    assert word in cli._COMMANDS


@pytest.mark.parametrize("page", ["README.md", "benchmarks/README.md"])
def test_the_files_that_a_page_links_to_exist(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    targets = {target for target in re.findall(r"\]\(([^)#\s]+)", text) if "://" not in target}
    assert [target for target in sorted(targets) if not (ROOT / page).parent.joinpath(target).exists()] == []


def test_the_readme_is_two_screens_long():
    assert len(README.splitlines()) <= 120, "README.md: what is more belongs in docs/"
