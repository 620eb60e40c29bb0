"""The timing of merging in a fit, what is measured, probed and drawn, and that nothing is left behind."""

import re

import lightning
import pytest
import timm
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from hasten.callbacks import EMA, Distillation, TokenMerging
from hasten.callbacks.token_merging import _arms
from hasten.errors import HastenError
from hasten.nn import VisionMamba

pytestmark = pytest.mark.filterwarnings("ignore:.*(does not have many workers|logging interval)")


class Foreign(lightning.LightningModule):
    """A classifier of its own kind, which notes how many tokens leave its backbone at every step."""

    def __init__(self, net):
        super().__init__()
        self.net = net
        self.tokens = {"train": [], "val": [], "test": []}

    def _loss(self, part, batch):
        images, labels = batch
        features = self.net.forward_features(images)
        self.tokens[part].append(features.shape[1])
        return F.cross_entropy(self.net(images), labels)

    def training_step(self, batch, batch_idx):
        return self._loss("train", batch)

    def validation_step(self, batch, batch_idx):
        self.log("val/loss", self._loss("val", batch))

    def test_step(self, batch, batch_idx):
        self._loss("test", batch)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def tiny_vit():
    return timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, depth=2, embed_dim=24, num_heads=2,
                             num_classes=3)  # fmt: skip


def tiny_vim(**sizes):
    return VisionMamba(32, **({"patch_size": 8, "depth": 4, "embed_dim": 16, "num_classes": 3} | sizes))


def foreign(net=None):
    torch.manual_seed(0)
    return Foreign(tiny_vim() if net is None else net)


def batches(n=8, batch_size=4):
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(n, 3, 32, 32, generator=generator) * 2 - 1
    return DataLoader(TensorDataset(images, torch.arange(n) % 3), batch_size)


def attached(folder):
    return TokenMerging(r=2, report=False), foreign(tiny_vit()), batches()


def trainer(folder, *callbacks, **settings):
    return lightning.Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=any(isinstance(c, ModelCheckpoint) for c in callbacks),
        enable_model_summary=False, enable_progress_bar=False, num_sanity_val_steps=0, callbacks=list(callbacks),
        default_root_dir=folder, **({"max_epochs": 1} | settings),
    )  # fmt: skip


def fitted(folder, callback, module=None, **settings):
    module = foreign() if module is None else module
    made = trainer(folder, callback, **settings)
    made.fit(module, batches(), batches())
    return made, module


# ---------------------------------------------------------------------- when it merges


@pytest.mark.parametrize(("when", "train", "val"), [("both", 12, 12), ("train", 12, 17), ("eval", 17, 12)])
def test_it_merges_in_training_in_evaluation_or_in_both(tmp_path, when, train, val):
    _, module = fitted(tmp_path, TokenMerging(r=5, when=when, report=False))
    assert module.tokens == {"train": [train] * 2, "val": [val] * 2, "test": []}


def test_it_begins_at_start_epoch(tmp_path):
    _, module = fitted(tmp_path, TokenMerging(r=5, start_epoch=2, report=False), max_epochs=3)
    assert module.tokens["train"] == module.tokens["val"] == [17, 17, 17, 17, 12, 12]


def test_r_grows_from_zero_over_the_ramp(tmp_path):
    _, module = fitted(tmp_path, TokenMerging(r=6, start_epoch=1, ramp_epochs=3, report=False), max_epochs=5)
    assert module.tokens["train"][::2] == [17, 17, 15, 13, 11]


def test_test_and_prediction_merge_in_full_whatever_the_ramp(tmp_path):
    callback, module = TokenMerging(r=5, start_epoch=9, report=False), foreign()
    trainer(tmp_path, callback).test(module, batches(), verbose=False)
    assert module.tokens["test"] == [12, 12]
    assert module.net.forward_features(torch.zeros(1, 3, 32, 32)).shape[1] == 17


def test_validation_alone_merges(tmp_path):
    callback, module = TokenMerging(r=5, report=False), foreign()
    trainer(tmp_path, callback).validate(module, batches(), verbose=False)
    assert module.tokens["val"] == [12, 12]


def test_a_compiled_model_is_refused_a_ramp(tmp_path):
    module = foreign()
    module.net.compile(backend="eager")
    with pytest.raises(HastenError, match="ramp_epochs: expected 0 with a compiled model"):
        fitted(tmp_path, TokenMerging(r=5, ramp_epochs=3), module)
    wrapped = foreign(torch.compile(tiny_vim(), backend="eager"))
    with pytest.raises(HastenError, match="ramp_epochs: expected 0 with a compiled model"):
        fitted(tmp_path, TokenMerging(r=5, ramp_epochs=3), wrapped)


def test_a_compiled_model_stays_compiled_through_probe_report_and_short_batches(tmp_path):
    module, graphs = foreign(), []

    def counting(graph, example_inputs):
        graphs.append(graph)
        return graph.forward

    module.net.compile(backend=counting)
    data = batches(n=10)  # the last batch is shorter
    callback = TokenMerging(r=6, start_epoch=1, probe_batches=3)
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        trainer(tmp_path, callback, max_epochs=4).fit(module, data, data)
    assert graphs


def prop_attn_of(vit):
    replaced = vars(vit).get("forward")
    return replaced.__self__._merging.prop_attn


class Notes(lightning.Callback):
    """Whether proportional attention is on, in training and in the test."""

    def __init__(self):
        self.seen = {}

    def on_train_batch_start(self, trainer, pl_module, *_):
        self.seen["train"] = prop_attn_of(pl_module.net)

    def on_test_batch_start(self, trainer, pl_module, *_):
        self.seen["test"] = prop_attn_of(pl_module.net)


def test_weights_trained_with_merging_are_tested_as_they_were_trained(tmp_path):
    callback, notes, module = TokenMerging(r=2, report=False), Notes(), foreign(tiny_vit())
    made = trainer(tmp_path, callback, notes)
    made.fit(module, batches())
    made.test(module, batches(), verbose=False)
    assert notes.seen == {"train": False, "test": False}


def test_weights_never_trained_with_merging_are_tested_with_proportional_attention(tmp_path):
    callback, notes, module = TokenMerging(r=2, report=False), Notes(), foreign(tiny_vit())
    trainer(tmp_path, callback, notes).test(module, batches(), verbose=False)
    assert notes.seen == {"test": True}


def test_weights_trained_with_merging_are_tested_so_from_their_checkpoint_too(tmp_path):
    module = foreign(tiny_vit())
    made = trainer(tmp_path, TokenMerging(r=2, report=False))
    made.fit(module, batches())
    made.save_checkpoint(tmp_path / "after.ckpt")
    notes = Notes()
    trainer(tmp_path, TokenMerging(r=2, report=False), notes).test(
        foreign(tiny_vit()), batches(), ckpt_path=tmp_path / "after.ckpt", verbose=False, weights_only=True
    )
    assert notes.seen == {"test": False}


def test_another_module_is_not_taken_for_the_one_that_was_trained(tmp_path):
    callback, notes = TokenMerging(r=2, report=False), Notes()
    trainer(tmp_path, callback).fit(foreign(tiny_vit()), batches())
    trainer(tmp_path, callback, notes).test(foreign(tiny_vit()), batches(), verbose=False)
    assert notes.seen == {"test": True}


def test_training_goes_on_merging_after_a_validation_within_the_epoch(tmp_path):
    _, module = fitted(tmp_path, TokenMerging(r=5, when="train", report=False), val_check_interval=1)
    assert module.tokens == {"train": [12, 12], "val": [17] * 4, "test": []}


def test_prediction_merges(tmp_path):
    class Predicts(Foreign):
        def predict_step(self, batch, batch_idx):
            return self.net.forward_features(batch[0]).shape[1]

    assert trainer(tmp_path, TokenMerging(r=5, report=False)).predict(Predicts(tiny_vim()), batches()) == [12, 12]


# ---------------------------------------------------------------------- attaching


class Late(Foreign):
    """Builds its network where sharded models are built."""

    def __init__(self):
        super().__init__(None)

    def configure_model(self):
        if self.net is None:
            self.net = tiny_vim()


def test_a_backbone_built_in_configure_model_is_found(tmp_path):
    _, module = fitted(tmp_path, TokenMerging(r=5, report=False), Late())
    assert module.tokens["train"] == [12, 12]


def test_a_module_without_a_backbone_is_refused_in_one_line(tmp_path):
    with pytest.raises(HastenError, match=r"target: expected a timm VisionTransformer or a hasten VisionMamba"):
        fitted(tmp_path, TokenMerging(r=5), foreign(nn.Sequential(nn.Flatten(), nn.Linear(3072, 3))))


def test_an_r_that_leaves_too_few_tokens_is_refused_with_its_block(tmp_path):
    with pytest.raises(HastenError, match="block 2: expected r from 0 to 8"):
        fitted(tmp_path, TokenMerging(r=9))


def test_a_backbone_that_merges_already_is_refused(tmp_path):
    module = foreign()
    with TokenMerging.attach(module, r=2), pytest.raises(HastenError, match="one that has one"):
        fitted(tmp_path, TokenMerging(r=3), module)


@pytest.mark.parametrize("net", [tiny_vit, tiny_vim])
def test_afterwards_the_model_computes_bit_for_bit_what_it_did(tmp_path, net):
    module, images = foreign(net()), next(iter(batches()))[0]
    module.configure_optimizers = lambda: torch.optim.SGD(module.parameters(), lr=0.0)
    before, keys = module.net.eval()(images), list(module.state_dict())
    fitted(tmp_path, TokenMerging(r=2, report=False), module)
    assert torch.equal(module.net.eval()(images), before)
    assert list(module.state_dict()) == keys


def test_it_works_beside_ema_and_distillation_in_any_order(tmp_path):
    for order in ((0, 1, 2), (2, 1, 0), (1, 2, 0)):
        callbacks = [TokenMerging(r=5, report=False), Distillation(target="net"), EMA(decay=0.5)]
        module = foreign()
        trainer(tmp_path, *(callbacks[i] for i in order)).fit(module, batches(), batches())
        assert module.tokens["val"] == [12, 12]
        assert module.net.forward_features(torch.zeros(1, 3, 32, 32)).shape[1] == 17


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"when": "always"}, "when: expected one of train, eval, both"),
        ({"start_epoch": -1}, "start_epoch: expected an int >= 0"),
        ({"ramp_epochs": 0.5}, "ramp_epochs: expected an int >= 0"),
        ({"r": -1}, "expected 0 or more"),
        ({"r": 0.5}, "r"),
        ({"folder": "pictures"}, "folder: expected none without trace_source"),
        ({"method": "tomes"}, "method: expected one of"),
    ],
)
def test_bad_arguments_are_refused_at_construction(arguments, message):
    with pytest.raises(ValueError, match=message):
        TokenMerging(**arguments)


# ---------------------------------------------------------------------- what it reports


def test_the_first_merged_batch_is_measured_printed_and_logged(tmp_path, capsys):
    made, _ = fitted(tmp_path, TokenMerging(r=5))
    out = capsys.readouterr().out
    assert re.search(r"2 *\S *17 *\S *12", out), out
    assert "FLOPs x 0." in out and "measured" in out
    metrics = {name: float(value) for name, value in made.callback_metrics.items() if name.startswith("token_merge/")}
    assert metrics["token_merge/tokens_last"] == 12
    assert metrics["token_merge/ratio"] == pytest.approx((17 * 2 + 12 * 2) / (17 * 4))
    assert 0.5 < metrics["token_merge/flops_ratio"] < 1
    assert metrics["token_merge/speedup"] > 0


def test_measuring_changes_nothing_of_the_training(tmp_path):
    weights = []
    for report in (True, False):
        torch.manual_seed(1)
        _, module = fitted(tmp_path, TokenMerging(r=5, report=report, probe_batches=2 * report),
                           foreign(tiny_vim(drop_path_rate=0.5)))  # fmt: skip
        weights.append(torch.cat([p.detach().flatten() for p in module.parameters()]))
    assert torch.equal(*weights)


def test_the_probe_classifies_with_every_arm_before_and_after(tmp_path, capsys):
    callback = TokenMerging(r=5, probe_batches=2, report=False)
    made, module = fitted(tmp_path, callback)
    out = capsys.readouterr().out
    for arm in ("unmerged", "merged", "unordered", "pruned"):
        assert f"token_merge/probe_{arm}" in made.callback_metrics
        assert arm in out
    assert "step 0" in out and "step 2" in out
    arms = {"merged": {}, "unordered": {"preserve_order": False}, "pruned": {"reduce": "prune"}}
    unmerged = [module.net.eval()(images).argmax(1) for images, _ in batches()]
    for arm, options in arms.items():
        right = agreed = 0
        with TokenMerging.attach(module, r=5, **options):
            for (images, labels), alone in zip(batches(), unmerged, strict=True):
                answers = module.net(images).argmax(1)
                right += (answers == labels).sum().item()
                agreed += (answers == alone).sum().item()
        assert callback._probed["step 2"][arm] == pytest.approx([right / 8, agreed / 8])
        assert made.callback_metrics[f"token_merge/probe_{arm}"] == pytest.approx(right / 8)


def test_the_unmerged_arm_of_the_probe_agrees_with_itself(tmp_path):
    callback = TokenMerging(r=5, probe_batches=2, report=False)
    fitted(tmp_path, callback)
    assert callback._probed["step 0"]["unmerged"][1] == callback._probed["step 2"]["unmerged"][1] == 1.0


def test_the_arms_of_a_probe_are_different_computations(tmp_path):
    module = foreign()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter))
    outputs = {}
    images = next(iter(batches()))[0]
    handle = TokenMerging.attach(module, r=8)
    for name, merging in _arms(handle.merging).items():
        with handle.using(merging):
            outputs[name] = module.net.eval()(images)
    handle.remove()
    assert list(outputs) == ["unmerged", "merged", "unordered", "pruned"]
    for one in outputs:
        for other in outputs:
            assert one == other or not torch.allclose(outputs[one], outputs[other])


def test_the_probe_reads_validation_data_that_lightning_would_read_later(tmp_path):
    callback = TokenMerging(r=5, probe_batches=2, report=False)
    made, _ = fitted(tmp_path, callback, check_val_every_n_epoch=2, max_epochs=2)
    assert list(callback._probed) == ["step 0", "step 4"]
    assert 0 <= made.callback_metrics["token_merge/probe_merged"] <= 1


def test_a_probe_without_validation_data_is_refused(tmp_path):
    with pytest.raises(HastenError, match="probe_batches: expected validation batches, got none"):
        fitted(tmp_path, TokenMerging(r=5, probe_batches=2), limit_val_batches=0)


def test_a_probe_of_a_backbone_without_a_head_is_refused(tmp_path):
    class Outside(Foreign):
        def __init__(self):
            super().__init__(tiny_vim(num_classes=0))
            self.head = nn.Linear(16, 3)

        def _loss(self, part, batch):
            return F.cross_entropy(self.head(self.net(batch[0])), batch[1])

    with pytest.raises(HastenError, match="probe_batches: expected a VisionMamba that classifies"):
        fitted(tmp_path, TokenMerging(r=5, probe_batches=1), Outside())


def test_a_probe_takes_the_first_of_several_loaders_and_converts_to_the_trainers_precision(tmp_path):
    class Two(Foreign):
        def validation_step(self, batch, batch_idx, dataloader_idx=0):
            pass

    callback = TokenMerging(r=5, probe_batches=9, report=False)
    trainer(tmp_path, callback, precision="bf16-true").fit(
        Two(tiny_vim()), batches(), {"a": batches(), "b": batches(4)}
    )
    assert list(callback._probed) == ["step 0", "step 2"]


def test_a_probe_needs_images_and_labels(tmp_path):
    class Unlabelled(Foreign):
        def _loss(self, part, batch):
            return self.net(batch).mean()

    module, data = Unlabelled(tiny_vim()), DataLoader(torch.zeros(4, 3, 32, 32), 2)
    with pytest.raises(HastenError, match=r"probe_batches: expected validation batches \(images, labels\)"):
        trainer(tmp_path, TokenMerging(r=5, probe_batches=1)).fit(module, data, data)


def test_a_module_that_changes_its_images_is_trained_and_its_speed_not_measured(tmp_path, capsys):
    class Resizes(Foreign):
        def _loss(self, part, batch):
            return super()._loss(part, (F.interpolate(batch[0], size=(32, 32)), batch[1]))

    large = DataLoader(TensorDataset(torch.rand(4, 3, 64, 64), torch.zeros(4, dtype=torch.long)), 4)
    trainer(tmp_path, TokenMerging(r=5)).fit(Resizes(tiny_vim()), large)
    out = " ".join(capsys.readouterr().out.split())
    assert "speed not measured, the backbone does not take the images of the batch" in out


def test_a_fit_that_merges_in_evaluation_only_reports_too(tmp_path, capsys):
    fitted(tmp_path, TokenMerging(r=5, when="eval"))
    assert "measured" in capsys.readouterr().out


def test_a_second_fit_reports_and_probes_anew(tmp_path):
    callback = TokenMerging(r=5, probe_batches=1)
    for _ in range(2):
        made, _ = fitted(tmp_path, callback)
        assert list(callback._probed) == ["step 0", "step 2"]
        assert "token_merge/speedup" in made.callback_metrics


def test_traced_tokens_become_a_picture_of_images_above_and_merged_tokens_below(tmp_path):
    from PIL import Image

    fitted(tmp_path, TokenMerging(r=8, report=False, trace_source=True, folder=tmp_path / "pictures"))
    picture = Image.open(tmp_path / "pictures" / "merged_tokens.png")
    # four images of 32 pixels, enlarged to 128, in two rows
    assert picture.size == (4 * 130 + 2, 2 * 130 + 2)
    assert (tmp_path / "pictures" / "merged_tokens_000002.png").is_file()


# ---------------------------------------------------------------------- resuming


def saved(folder, **arguments):
    module = foreign()
    trainer(folder, TokenMerging(report=False, **arguments), ModelCheckpoint(folder, save_last=True)).fit(
        module, batches(), batches()
    )
    return folder / "last.ckpt"


def test_a_run_resumes_with_the_same_merging_only(tmp_path):
    checkpoint = saved(tmp_path, r=5)
    for r in (5, 4):
        made = trainer(tmp_path, TokenMerging(r=r, report=False), max_epochs=2)
        if r == 5:
            made.fit(foreign(), batches(), ckpt_path=checkpoint, weights_only=True)
            assert made.global_step == 4
        else:
            with pytest.raises(
                HastenError, match=r"r: expected \[0, 0, 5, 0\] as in the checkpoint, got \[0, 0, 4, 0\]"
            ):
                made.fit(foreign(), batches(), ckpt_path=checkpoint, weights_only=True)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"distance": "l1"}, "distance: expected cosine as in the checkpoint, got l1"),
        ({"reduce": "prune"}, "prune: expected False"),
        ({"when": "train"}, "when: expected both"),
        ({"start_epoch": 1}, "start_epoch: expected 0"),
    ],
)
def test_a_run_resumes_with_nothing_else_changed(tmp_path, other, message):
    checkpoint = saved(tmp_path, r=5)
    made = trainer(tmp_path, TokenMerging(r=5, report=False, **other), max_epochs=2)
    with pytest.raises(HastenError, match=message):
        made.fit(foreign(), batches(), ckpt_path=checkpoint, weights_only=True)


def test_a_checkpoint_loads_without_the_callback_and_one_without_it_loads_with_it(tmp_path):
    made = trainer(tmp_path, max_epochs=2)
    made.fit(foreign(), batches(), ckpt_path=saved(tmp_path, r=5), weights_only=True)
    trainer(tmp_path, ModelCheckpoint(tmp_path / "plain", save_last=True)).fit(foreign(), batches())
    made = trainer(tmp_path, TokenMerging(r=5, report=False), max_epochs=2)
    made.fit(foreign(), batches(), ckpt_path=tmp_path / "plain" / "last.ckpt", weights_only=True)
    assert made.global_step == 4


def test_attach_is_there_without_lightning():
    vim = tiny_vim()
    with TokenMerging.attach(vim, r=5):
        assert vim.forward_features(torch.zeros(1, 3, 32, 32)).shape[1] == 12
    assert vim.forward_features(torch.zeros(1, 3, 32, 32)).shape[1] == 17


def test_the_test_after_a_fit_does_not_report_again_and_one_without_a_fit_does(tmp_path, capsys):
    made, module = fitted(tmp_path, TokenMerging(r=5))
    assert "measured" in capsys.readouterr().out
    made.test(module, batches(), verbose=False)
    assert "measured" not in capsys.readouterr().out
    trainer(tmp_path, TokenMerging(r=5)).test(module, batches(), verbose=False)
    assert "measured" in capsys.readouterr().out
