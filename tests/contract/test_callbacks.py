"""What every callback owes to the LightningModule of a stranger; a test file per callback says whom it can serve.

``tests/callbacks/test_<name>.py`` holds ``attached(folder)``: a callback, a module that has never heard of hasten, and
the data to fit it on.
"""

import importlib
import importlib.util
import re
import shutil
from pathlib import Path

import lightning
import pytest
import torch
from lightning.pytorch import Callback
from torch import nn
from torch.utils._pytree import tree_flatten
from torch.utils.data import DataLoader

import hasten.callbacks
from hasten.errors import HastenError
from hasten.run import checkpoint_of

FOLDER = Path(__file__).parents[1] / "callbacks"
NAMES = {name: re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower() for name in hasten.callbacks.__all__}


def _attached(name, folder):
    path = FOLDER / f"test_{NAMES[name]}.py"
    assert path.is_file(), f"hasten.callbacks.{name}: there is no tests/callbacks/{path.name}"
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert hasattr(module, "attached"), f"tests/callbacks/{path.name}: expected a function attached(folder)"
    return module.attached(folder)


def _trainer(folder, *callbacks, **settings):
    return lightning.Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_model_summary=False, num_sanity_val_steps=0,
        enable_progress_bar=any(isinstance(callback, hasten.callbacks.Progress) for callback in callbacks),
        callbacks=list(callbacks), default_root_dir=folder, **({"max_steps": 2} | settings),
    )  # fmt: skip


def _fit(trainer, module, data, **settings):
    if isinstance(data, lightning.LightningDataModule):
        trainer.fit(module, datamodule=data, **settings)
    else:
        trainer.fit(module, data, **settings)


def _traces(module: nn.Module) -> dict:
    """What a callback could leave behind: attributes, hooks, keys of the state_dict, modes, what is frozen."""
    hooks = [
        "_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks", "_state_dict_hooks",
        "_load_state_dict_pre_hooks",
    ]  # fmt: skip
    # Lightning sets these on any module that was ever fitted
    lightnings = {
        "_trainer",
        "_jit_is_scripting",
        "_param_requires_grad_state",
        "_current_fx_name",
        "_metric_attributes",
    }
    return {
        name: (
            sorted(set(vars(part)) - lightnings),
            {hook: len(getattr(part, hook)) for hook in hooks},
            part.training,
            {own: parameter.requires_grad for own, parameter in part.named_parameters(recurse=False)},
        )
        for name, part in module.named_modules()
    } | {"state_dict": sorted(module.state_dict())}


class Breaks(Callback):
    """An error in the middle of training, after the first step."""

    def on_train_batch_end(self, trainer, pl_module, *_):
        raise RuntimeError("in the middle")


@pytest.mark.parametrize("name", NAMES)
def test_a_callback_leaves_a_strangers_module_as_it_found_it(name, tmp_path):
    callback, module, data = _attached(name, tmp_path)
    plain = _attached(name, tmp_path)[1]
    _fit(_trainer(tmp_path), plain, data)  # what Lightning alone leaves behind
    _fit(_trainer(tmp_path, callback), module, data)
    assert _traces(module) == _traces(plain)


@pytest.mark.parametrize("name", NAMES)
def test_a_callback_leaves_the_module_as_it_found_it_after_an_exception(name, tmp_path):
    callback, module, data = _attached(name, tmp_path)
    plain = _attached(name, tmp_path)[1]
    for part, callbacks in ((plain, [Breaks()]), (module, [callback, Breaks()])):
        with pytest.raises(RuntimeError, match="in the middle"):
            _fit(_trainer(tmp_path, *callbacks), part, data)
    assert _traces(module) == _traces(plain)


@pytest.mark.parametrize("name", NAMES)
def test_a_callback_serves_a_second_fit_as_a_fresh_one_does(name, tmp_path):
    folder, written = tmp_path / "fits", tmp_path / "written"
    folder.mkdir()
    used, module, data = _attached(name, folder)
    _fit(_trainer(folder, used), module, data)
    shutil.copytree(folder, written)
    weights = []
    for serves_again in (True, False):
        shutil.rmtree(folder)
        shutil.copytree(written, folder)  # some go on with the files of the fit before
        lightning.seed_everything(1, verbose=False)
        fresh, module, data = _attached(name, folder)
        _fit(_trainer(folder, used if serves_again else fresh), module, data)
        weights.append(dict(module.named_parameters()) | dict(module.named_buffers()))
    torch.testing.assert_close(*weights, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("name", NAMES)
def test_undoing_is_safe_without_a_set_up_and_twice(name, tmp_path):
    callback, module, _ = _attached(name, tmp_path)
    trainer = _trainer(tmp_path)
    for _ in range(2):
        callback.on_exception(trainer, module, RuntimeError("before any set-up"))
        callback.teardown(trainer, module, "fit")


class Saves(Callback):
    """A checkpoint after the first step, and the state of a ``callback`` when the fit begins."""

    def __init__(self, path, callback):
        self.path, self.callback, self.at_start = path, callback, None

    def on_train_start(self, trainer, pl_module):
        self.at_start = self.callback.state_dict()

    def on_train_batch_end(self, trainer, pl_module, *_):
        if not self.path.exists():
            trainer.save_checkpoint(self.path)


@pytest.mark.parametrize("name", NAMES)
def test_the_state_of_a_callback_loads_weights_only_and_is_taken_up(name, tmp_path):
    path = tmp_path / "first.ckpt"
    for settings in ({}, {"ckpt_path": path, "weights_only": True}):
        callback, module, data = _attached(name, tmp_path)
        saves = Saves(path, callback)
        _fit(_trainer(tmp_path, callback, saves), module, data, **settings)
    saved = torch.load(path, weights_only=True)["callbacks"].get(callback.state_key, {})
    (wanted, form), (found, found_form) = tree_flatten(saved), tree_flatten(saves.at_start)
    assert found_form == form
    for one, other in zip(found, wanted, strict=True):
        if isinstance(one, str | bool | None):
            assert one == other
        else:
            torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("name", NAMES)
def test_a_checkpoint_has_the_keys_of_the_module_as_it_was_built(name, tmp_path):
    callback, module, data = _attached(name, tmp_path)
    path = tmp_path / "first.ckpt"
    _fit(_trainer(tmp_path, callback, Saves(path, callback)), module, data)
    assert checkpoint_of(str(path), _attached(name, tmp_path)[1])  # anything else is refused


class Bare(lightning.LightningModule):
    """Nothing to hold on to: no pictures, no scheduler, no loss terms."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 1)

    def training_step(self, batch, batch_idx):
        return self.layer(batch).mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.parametrize("name", NAMES)
def test_a_callback_serves_any_other_module_or_refuses_it_in_one_line(name, tmp_path):
    callback = _attached(name, tmp_path)[0]
    module = Bare()
    before = _traces(module)
    try:
        _fit(_trainer(tmp_path, callback), module, DataLoader(torch.ones(4, 2)))
    except HastenError as error:
        lines = str(error).splitlines()
    else:
        return
    assert len(lines) == 1
    assert _traces(module)["layer"] == before["layer"]
