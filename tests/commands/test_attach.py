"""``hasten attach`` on modules that have never heard of hasten; what it says is what the callbacks say."""

import sys

import lightning
import pytest
import torch
from torch import nn

from hasten.cli import main
from hasten.commands.attach import made, made_callback, public_callbacks, recipe, tried
from hasten.datamodules import Digits
from hasten.errors import HastenError

STRANGER = """
import lightning, timm, torch
from diffusers import DDPMScheduler
from torch import nn

class Net(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.first, self.last = nn.Conv2d(1, width, 3, padding=1), nn.Conv2d(width, 1, 3, padding=1)

    def forward(self, x, timestep):
        return self.last(self.first(x))

class Denoiser(lightning.LightningModule):
    def __init__(self, width, lr=0.1):
        super().__init__()
        self.net, self.lr = Net(width), lr
        self.scheduler = DDPMScheduler(num_train_timesteps=500)

    def training_step(self, batch, batch_idx):
        return self.net(batch, None).mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.lr)

class Classifier(Denoiser):
    def __init__(self):
        super().__init__(2)
        self.net = timm.create_model("vit_tiny_patch16_224", img_size=16, patch_size=2, depth=2, embed_dim=32, num_heads=2)

    def setup(self, stage):
        raise RuntimeError("not by hasten attach")

def classifier():
    return Classifier()

class Says(lightning.LightningModule):
    def __init__(self, lr, widths, note):
        raise ValueError(f"got {(lr, widths, note)}")

class Plain:
    pass

class Breaks(lightning.LightningModule):
    def __init__(self):
        raise ValueError("no\\nfile")

number = 3
"""  # noqa: E501

OTHER_KIND = """
from pytorch_lightning import LightningModule

class Base(LightningModule):
    pass

class Net(Base):
    pass

def net():
    return Net()
"""


@pytest.fixture(autouse=True)
def _own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "their_own.py").write_text(STRANGER)
    (tmp_path / "broken.py").write_text("import nothing_of_this_name")
    (tmp_path / "other_kind.py").write_text(OTHER_KIND)
    yield
    for name in ("their_own", "other_kind", "attached_their_own", "attached_broken"):
        sys.modules.pop(name, None)


def _rows(printed):
    """Name -> what is said of it."""
    lines = (line.split(None, 2) for line in printed.splitlines() if "  fits " in line or "  refuses " in line)
    return {name: (verdict, said) for name, verdict, said in lines}


def test_a_denoiser_hears_of_every_callback_whether_it_fits_and_how_or_why_not(capsys, tmp_path):
    assert main(["attach", "their_own:Denoiser", "width=4"]) == 0
    printed = capsys.readouterr().out
    rows = _rows(printed)
    assert rows.keys() >= public_callbacks().keys()
    assert "holds scheduler: DDPMScheduler of diffusers, 500 timesteps" in printed
    assert rows["TimestepSampling"][0] == "fits"
    assert rows["TimestepSampling"][1].split("#")[0].strip() == "TimestepSampling(SpeeDSampler)"
    assert "from hasten.nn import SpeeDSampler" in rows["TimestepSampling"][1]
    assert rows["EMA"] == ("fits", "EMA()")
    assert rows["hypernetize"][0] == "fits"
    module = made("their_own:Denoiser", {"width": 4})
    for name in ("ImageGrid", "SampleDistance"):
        callback = made_callback(public_callbacks()[name])
        with pytest.raises(HastenError) as said:
            callback.setup(lightning.Trainer(accelerator="cpu", logger=False, barebones=True), module, "fit")
        assert rows[name] == ("refuses", str(said.value))
    assert sorted(path.stem for path in tmp_path.iterdir() if path.suffix) == ["broken", "other_kind", "their_own"]


def test_what_refuses_only_when_the_fit_starts_refuses_here():
    module, data = made("their_own:Denoiser", {"width": 4}), Digits()
    said = {name: tried(name, module, data).refusal for name in ("EvaluateDistilled", "MagnitudeProbe", "TokenMerging")}
    assert said["EvaluateDistilled"].startswith("evaluate_distilled: ") and "synthetic" in said["EvaluateDistilled"]
    assert said["MagnitudeProbe"].startswith("magnitude_probe: ") and "hypernetize" in said["MagnitudeProbe"]
    assert said["TokenMerging"].startswith("token_merging: ") and "VisionTransformer" in said["TokenMerging"]


def test_the_table_says_that_it_knows_only_what_setup_can_tell(capsys):
    assert main(["attach", "their_own:Denoiser", "width=4"]) == 0
    printed = capsys.readouterr().out
    assert _rows(printed)["Distillation"][0] == "fits"  # though a denoiser gives no logits, which a fit finds out
    assert "hasten.callbacks, as far as their setup can tell: " in printed
    assert "may still refuse in the first batch" in printed


@pytest.mark.parametrize(
    ("words", "given"),
    [
        (["lr=1e-3", "widths=[32,1_000]", "note='a=b, c'"], (0.001, [32, 1000], "a=b, c")),
        (["lr=1E5", "widths={a: [null, true]}", "note=null"], (100_000.0, {"a": [None, True]}, None)),
    ],
)
def test_words_mean_what_they_mean_in_a_run(words, given, capsys):
    assert main(["attach", "their_own:Says", *words]) == 1
    assert capsys.readouterr().err.endswith(f"ValueError: got {given}\n")


def test_a_vit_is_found_and_merges_whatever_its_module_builds_later(capsys):
    assert main(["attach", "their_own.py:classifier"]) == 0
    printed = capsys.readouterr().out
    rows = _rows(printed)
    assert "holds net: VisionTransformer of timm, which merges tokens" in printed
    assert "was not asked for what it builds in setup" in printed
    assert rows["TokenMerging"] == ("fits", "TokenMerging()")
    assert rows["attach_token_merging"][0] == "fits"
    assert rows["TimestepSampling"][0] == "refuses"  # a ViT takes no timesteps


def _state(module):
    hooks = {
        (name, kind): len(getattr(part, kind))
        for name, part in module.named_modules()
        for kind in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_state_dict_hooks")
    }
    attributes = {name: sorted(vars(part)) for name, part in module.named_modules()}
    modes = {name: part.training for name, part in module.named_modules()}
    gradients = {name: parameter.requires_grad for name, parameter in module.named_parameters()}
    return hooks, attributes, modes, gradients, module._trainer


@pytest.mark.parametrize("name", public_callbacks())
def test_the_module_is_left_as_it_was_found(name):
    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            import timm

            self.model = timm.create_model(
                "vit_tiny_patch16_224", img_size=16, patch_size=2, depth=2, embed_dim=32, num_heads=2, num_classes=10
            )
            self.frozen = nn.Linear(2, 2).eval().requires_grad_(False)
            self.loss_terms = {}

        def training_step(self, batch, batch_idx):
            raise AssertionError("nothing is trained")

        def configure_optimizers(self):
            raise AssertionError("nothing is trained")

        def generate(self, n, labels=None, steps=None, generator=None):
            raise AssertionError("nothing is drawn")

        pictures = generate

    module, x = Module(), torch.randn(2, 3, 16, 16)
    module.model.eval()
    weights = {name: value.clone() for name, value in module.state_dict().items()}
    before, forward = _state(module), module.model(x)
    attributes = {name: id(value) for name, value in vars(module).items() if name != "_trainer"}
    verdict = tried(name, module, Digits())
    assert verdict.name == name
    assert _state(module) == before
    assert {name: id(value) for name, value in vars(module).items() if name != "_trainer"} == attributes
    torch.testing.assert_close(dict(module.state_dict()), weights, rtol=0, atol=0)
    torch.testing.assert_close(module.model(x), forward, rtol=0, atol=0)


@pytest.mark.parametrize(("name", "callback"), public_callbacks().items())
def test_every_callback_can_be_made_to_be_tried(name, callback):
    code, _ = recipe(callback)  # of a new callback: its defaults, or the example in its docstring
    assert code.startswith(f"{name}(")
    assert type(made_callback(callback)) is callback


def test_a_callback_that_cannot_be_made_is_named():
    class Silent(lightning.Callback):
        """Says nothing of itself."""

        def __init__(self, *, number):
            self.number = number

    with pytest.raises(HastenError, match=r"Silent: expected an example in its docstring .* add it to test_attach.py"):
        recipe(Silent)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "expected module:Class"),
        (["their_own"], "expected module:Class"),
        (["nothing_there:Net"], "cannot import 'nothing_there': ModuleNotFoundError"),
        (["nothing_there.py:Net"], "there is no file 'nothing_there.py'"),
        (["broken.py:Net"], "cannot import 'broken.py': ModuleNotFoundError"),
        (["their_own:Denoisr"], "did you mean 'Denoiser'?"),
        (["their_own:Plain"], "expected a LightningModule, got a class derived from object"),
        (["their_own:number"], "expected a class or a function, got int"),
        (["their_own:Plain.x"], "their_own has no 'Plain.x'"),
        (["their_own:Denoiser"], "missing a required argument: 'width'; give key=value of: width, lr=0.1"),
        (["their_own:Denoiser", "width=4", "wide=1"], "got an unexpected keyword argument 'wide'"),
        (["their_own:Denoiser", "width"], "expected key=value, got 'width'"),
        (["their_own:Denoiser", "width=[1"], "width: expected a value as in a run, got '[1'"),
        (["their_own:Denoiser", "width=1,2"], "width: expected one value, got '1,2'; write a list as width=[1,2]"),
        (["their_own:Breaks"], "cannot be made: ValueError: no file"),
        (["their_own:Net", "width=2"], "expected a LightningModule, got a class derived from torch.nn.modules."),
        (
            ["other_kind:Base"],
            "derived from pytorch_lightning.core.module.LightningModule; import lightning, not pytorch",
        ),
        (["other_kind:Net"], "derived from other_kind.Base; import lightning, not pytorch_lightning"),
        (["other_kind:net"], "got a Net, a class derived from other_kind.Base; import lightning, not pytorch"),
        (["their_own:Denoiser", "--trained"], "see hasten attach --help"),
    ],
)
def test_a_mistake_is_one_line(words, said, capsys):
    assert main(["attach", *words]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and said in lines[0]
    assert lines[0].startswith("hasten: attach: ")


def test_help_says_what_it_takes(capsys):
    assert main(["attach", "--help"]) == 0
    assert "module:Class" in capsys.readouterr().out
