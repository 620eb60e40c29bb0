"""``hasten export`` of runs in their tiny form; the code on a card is run as it stands, in the folder it stands in."""

import json
import os
import re
import shutil

import pytest
import timm
import torch
import yaml

from hasten import registry
from hasten.cli import main
from hasten.formats import Distilled, PixelRange
from hasten.run import compose, run
from hasten.run_folders import config_of, resumes_by_files

DIGITS = [name for name in registry.group("experiment") if name.endswith("_digits")]
RUN_BY_OTHERS = ["vit_digits", "vim_digits", "speed_digits", "mip_digits"]
"""The experiments that the tests of every day export anyway."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where all runs of this file share what they are built upon."""
    return tmp_path_factory.mktemp("export")


@pytest.fixture(scope="module")
def trained(folder):
    """``trained(name, *words)`` -> the result of that experiment in its tiny form, trained once."""
    results, cwd = {}, os.getcwd()

    def train(name, *words):
        key = (name, *words)
        if key not in results:
            results[key] = run(compose([f"experiment={name}", *compose([f"experiment={name}"]).tiny, *words]))
        return results[key]

    os.chdir(folder)
    yield train
    os.chdir(cwd)


@pytest.fixture(autouse=True)
def _one_folder(folder, monkeypatch):
    monkeypatch.chdir(folder)
    monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)


def _exported(result, out, *words):
    assert main(["export", str(result.folder), "--out", str(out), *words]) == 0
    return (out / "README.md").read_text()


def _loaded(card, out, monkeypatch):
    """What the code on the card gives a person who stands in its folder."""
    [code] = re.findall(r"^```python\n(.*?)^```", card, flags=re.MULTILINE | re.DOTALL)
    monkeypatch.chdir(out)
    scope = {}
    exec(code, scope)
    return scope


def _front(card):
    return yaml.safe_load(card.split("---\n")[1])


def _assert_same_weights(model, other):
    own, wanted = model.state_dict(), other.state_dict()
    assert own.keys() == wanted.keys()
    for name in wanted:
        torch.testing.assert_close(own[name], wanted[name], rtol=0, atol=0)


# Lightning's advice, on runs of two steps
pytestmark = [
    pytest.mark.filterwarnings(f"ignore:{advice}")
    for advice in ("The number of training batches", "You passed in a `val_dataloader`", "Using ModelCheckpoint with")
]


# ------------------------------------------------------------------ what comes out is what was tested


@pytest.mark.parametrize("name", ["vit_digits", "vim_digits"])
def test_timm_makes_the_classifier_that_was_tested(name, trained, tmp_path, monkeypatch):
    result, images = trained(name), torch.randn(3, 1, 16, 16)
    card = _exported(result, tmp_path / "out")
    model = _loaded(card, tmp_path / "out", monkeypatch)["model"].eval()
    tested = result.module.model.eval()
    assert type(model) is type(tested)
    with torch.no_grad():
        torch.testing.assert_close(model(images), tested(images), rtol=0, atol=0)
    data = timm.data.resolve_model_data_config(model)
    assert (list(data["input_size"]), data["mean"], data["crop_pct"]) == ([1, 16, 16], [0.5], 1.0)
    finer = timm.create_model(f"local-dir:{tmp_path / 'out'}", num_classes=3)
    assert finer(images).shape == (3, 3)
    assert _front(card)["library_name"] == "timm" and "image-classification" in _front(card)["tags"]


@pytest.mark.parametrize(
    "words",
    [
        ["model.model.widths=[8,16]"],
        ["model=unet", "~model.model", "model.widths=[8,16]"],
        ["model=dit", "~model.model", "model.patch_size=2", "model.width=32", "model.depth=1", "model.heads=2"],
    ],
    ids=["unet in a skip", "unet", "dit"],
)
def test_diffusers_makes_the_denoiser_that_was_tested(words, tmp_path, monkeypatch, capsys):
    tiny = [word for word in compose(["experiment=speed_digits"]).tiny if not word.startswith("model.")]
    result = run(compose(["experiment=speed_digits", *tiny, *words, "~callbacks.class_consistency"]))
    card = _exported(result, tmp_path / "out")
    assert "the moving average (EMA)" in card and "the moving average (EMA)" in capsys.readouterr().out
    assert ("LinearSkip" in card) == (len(words) == 1)
    scope = _loaded(card, tmp_path / "out", monkeypatch)
    model, tested = scope["model"].eval(), result.module.model.eval()
    x, t, labels = torch.randn(2, 1, 8, 8), torch.tensor([3, 900]), torch.tensor([1, 10])
    with torch.no_grad():
        found, wanted = (net(x, t, class_labels=labels) for net in (model, tested))
    torch.testing.assert_close(getattr(found, "sample", found), getattr(wanted, "sample", wanted), rtol=0, atol=0)
    scheduler = result.module.noise_scheduler
    assert scope["scheduler"].config.prediction_type == scheduler.config.prediction_type
    torch.testing.assert_close(scope["scheduler"].betas, scheduler.betas)


def test_any_other_network_is_built_from_its_node(trained, tmp_path, monkeypatch):
    result = trained("mip_digits")
    card = _exported(result, tmp_path / "out")
    model = _loaded(card, tmp_path / "out", monkeypatch)["model"].eval()
    images = torch.randn(2, 1, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(model(images, angle=30.0), result.module.model.eval()(images, angle=30.0))
    assert _front(card)["library_name"] == "hasten"


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in RUN_BY_OTHERS else [pytest.mark.slow]) for name in DIGITS]
)
def test_every_digits_experiment_is_exported_or_says_why_not(name, trained, folder, tmp_path, monkeypatch, capsys):
    result = trained(name)
    if resumes_by_files(config_of(result.folder)):
        assert main(["export", str(result.folder), "--out", str(tmp_path / "out")]) == 1
        assert "leaves a file for each of many" in capsys.readouterr().err
        return
    card = _exported(result, tmp_path / "out")
    scope = _loaded(card, tmp_path / "out", monkeypatch)
    if "distilled" in scope:
        assert torch.equal(scope["distilled"].images, Distilled.read(folder / result.folder / "distilled/best").images)
    else:
        _assert_same_weights(scope["model"], result.module.model)


# ------------------------------------------------------------------ the card


def test_the_card_says_what_it_reached_how_it_was_made_and_whom_to_cite(trained, tmp_path):
    result = trained("speed_digits")
    card = _exported(result, tmp_path / "out")
    front = _front(card)
    assert front["datasets"] == ["digits"] and "test/mse" in front["metrics"] and "speed" in front["tags"]
    assert f"| test/mse | {result.metrics['test/mse']:.4g} |" in card
    assert "python train.py experiment=speed_digits" in card and "'model.model.widths=[8,16]'" in card
    assert "Seed 0; python 3" in card and f"torch {torch.__version__.partition('+')[0]}" in card
    assert "arXiv:2405.17403" in card and "@inproceedings{wang2025closer" in card


def test_the_last_checkpoint_is_exported_where_it_is_asked_for(trained, tmp_path):
    result = trained("vit_digits")
    shutil.copytree(result.folder, tmp_path / "run")
    checkpoint = torch.load(tmp_path / "run/checkpoints/last.ckpt", weights_only=True)
    checkpoint["state_dict"]["model.head.bias"] += 1
    torch.save(checkpoint, tmp_path / "run/checkpoints/last.ckpt")
    assert main(["export", str(tmp_path / "run"), "--checkpoint", "last"]) == 0
    card = (tmp_path / "run/export/README.md").read_text()
    assert "From checkpoints/last.ckpt" in card
    model = timm.create_model(f"local-dir:{tmp_path / 'run/export'}", pretrained=True)
    torch.testing.assert_close(model.head.bias, checkpoint["state_dict"]["model.head.bias"], rtol=0, atol=0)


def test_a_run_that_merged_tokens_says_that_its_network_alone_does_not(trained, tmp_path):
    result = trained("vit_digits")
    shutil.copytree(result.folder, tmp_path / "run")
    config = yaml.safe_load((tmp_path / "run/config.yaml").read_text())
    config["callbacks"]["token_merging"] = {"_target_": "hasten.callbacks.TokenMerging", "r": 8}
    config["module"]["model"]["checkpoint"] = "a/stage/that/is/gone.ckpt"
    (tmp_path / "run/config.yaml").write_text(yaml.safe_dump(config))
    assert main(["export", str(tmp_path / "run")]) == 0
    card = (tmp_path / "run/export/README.md").read_text()
    assert "The run merged tokens, r = 8" in card and "gone.ckpt" not in card
    assert "gone" not in (tmp_path / "run/export/config.json").read_text()


def test_distilled_images_are_copied_with_a_card(tmp_path, monkeypatch):
    pixels = PixelRange(torch.tensor(0.5), torch.tensor(0.5))
    labels = torch.eye(2)
    for name, value in {"best": 0.0, "final": 1.0}.items():
        images = torch.full((2, 1, 8, 8), value)
        Distilled(images, labels, torch.tensor([0, 1]), 0.02, pixels).write(tmp_path / "run/distilled" / name)
    (tmp_path / "run/config.yaml").write_text("experiment: edf_digits\nmodule: {_target_: hasten.modules.X}\n")
    (tmp_path / "run/result.json").write_text(json.dumps({"status": "complete", "metrics": {"eval/acc": 0.5}}))
    for words, value in (([], 0.0), (["--checkpoint", "last"], 1.0)):
        out = tmp_path / f"out{value}"
        assert main(["export", str(tmp_path / "run"), "--out", str(out), *words]) == 0
        scope = _loaded((out / "README.md").read_text(), out, monkeypatch)
        assert scope["distilled"].images.unique().item() == value


def _with(result, tmp_path, **sections):
    """A copy of a run in whose config.yaml these keys of sections are others; data with a target, the whole section."""
    shutil.copytree(result.folder, tmp_path / "run")
    path = tmp_path / "run/config.yaml"
    config = yaml.safe_load(path.read_text())
    for section, keys in sections.items():
        config[section] = keys if "_target_" in keys else config[section] | keys
    path.write_text(yaml.safe_dump(config))
    return tmp_path / "run"


def _normalisation(run):
    """What timm is told of it, and the card."""
    assert main(["export", str(run)]) == 0
    written = json.loads((run / "export/config.json").read_text())["pretrained_cfg"]
    return {key: written[key] for key in ("mean", "std") if key in written}, (run / "export/README.md").read_text()


_IMAGENET = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
_SUBSET = {"_target_": "hasten.datamodules.ImageNetSubset", "subset": [0, "n02102040"]}


@pytest.mark.parametrize(
    ("data", "wanted"),
    [
        ({"mean": 0.1, "std": [0.3]}, {"mean": [0.1], "std": [0.3]}),
        ({"mean": 0.25}, {"mean": [0.25], "std": [0.5]}),
        ({"zca": True}, {"mean": [0.0], "std": [1.0]}),
    ],
    ids=["named", "one named", "whitened"],
)
def test_timm_normalises_as_the_run_did(data, wanted, trained, tmp_path):
    found, card = _normalisation(_with(trained("vit_digits"), tmp_path, data=data))
    assert found == wanted
    assert ("whitened (ZCA), which config.json cannot say" in card) == ("zca" in data)


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        ({}, _IMAGENET),
        ({"mean": None, "std": None}, _IMAGENET),
        ({"mean": [0.1, 0.2, 0.3], "std": None}, {"mean": [0.1, 0.2, 0.3], "std": _IMAGENET["std"]}),
    ],
    ids=["nothing named", "null", "one named"],
)
def test_what_stands_for_null_is_asked_of_the_datamodule(words, wanted, trained, tmp_path):
    for wnid in ("n01440764", "n02102040"):
        (tmp_path / "images/train" / wnid).mkdir(parents=True)
    data = _SUBSET | {"root": str(tmp_path / "images")} | words
    run = _with(trained("vit_digits"), tmp_path, image={"channels": 3}, data=data)
    assert _normalisation(run)[0] == wanted


@pytest.mark.parametrize(
    ("data", "wanted"),
    [
        (_SUBSET | {"mean": 0.1, "std": [0.2, 0.3, 0.4]}, {"mean": [0.1] * 3, "std": [0.2, 0.3, 0.4]}),
        ({"_target_": "hasten.datamodules.ImageFolder", "std": 0.2}, {"mean": [0.5] * 3, "std": [0.2] * 3}),
        (_SUBSET, {}),
        ({"_target_": "hasten.datamodules.ImageFolder", "zca": True}, {}),
        ({"_target_": "their.Images"}, {}),
    ],
    ids=["named", "default", "in its code", "whitened", "someone's own"],
)
def test_without_the_files_of_its_data_it_writes_what_is_named_and_guesses_nothing(data, wanted, trained, tmp_path):
    data = data | {"root": "gone", "image_size": 16}
    found, card = _normalisation(_with(trained("vit_digits"), tmp_path, image={"channels": 3}, data=data))
    assert found == wanted
    assert ("Config.json has no mean and std" in card) == (not wanted)


def test_a_denoiser_is_tagged_by_whether_it_is_asked_for_a_class(trained, tmp_path):
    for num_classes, tag in ((10, "class-conditional-image-generation"), (None, "unconditional-image-generation")):
        run = _with(trained("speed_digits"), tmp_path / tag, module={"num_classes": num_classes})
        assert main(["export", str(run)]) == 0
        tags = _front((run / "export/README.md").read_text())["tags"]
        assert [name for name in tags if name.endswith("generation")] == [tag]


# ------------------------------------------------------------------ what goes wrong


def _broken(run, tmp_path, what):
    """A copy of a run in which one thing is not as it should be."""
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    path = folder / "config.yaml"
    config = yaml.safe_load(path.read_text())
    if what == "no checkpoint":
        shutil.rmtree(folder / "checkpoints")
        (folder / "result.json").write_text(json.dumps({"status": "interrupted"}))
    elif what == "half a checkpoint":
        checkpoint = folder / "checkpoints/best.ckpt"
        checkpoint.write_bytes(checkpoint.read_bytes()[:1000])
    elif what == "sharded":
        (folder / "checkpoints/best.ckpt").unlink()
        (folder / "checkpoints/best.ckpt").mkdir()
    elif what == "no model":
        config["module"] = {"_target_": "their.Module"}
    elif what == "unknown model":
        config["module"]["model"]["_target_"] = "nothing.of.this.name"
    elif what == "no network":
        config["module"]["model"] = {"_target_": "builtins.dict"}
    elif what == "another size":
        config["module"]["model"]["embed_dim"] = 32
    elif what == "a task":
        shutil.rmtree(folder / "checkpoints")
        config["task"] = {"_target_": "hasten.tasks.difficulty"}
    path.write_text(yaml.safe_dump(config))
    return folder


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("no checkpoint", "which is interrupted, got none; choose another run"),
        ("half a checkpoint", "is no whole Lightning checkpoint"),
        ("sharded", "which is sharded"),
        ("no model", "expected a network as module.model in config.yaml, got their.Module without"),
        ("unknown model", "nothing.of.this.name"),
        ("no network", "expected a network, got dict"),
        ("another size", "does not fit"),
        ("a task", "it ran the task hasten.tasks.difficulty"),
    ],
)
def test_what_cannot_be_exported_is_one_line_and_leaves_nothing(what, said, trained, tmp_path, capsys):
    folder = _broken(trained("vit_digits").folder, tmp_path, what)
    before = sorted(tmp_path.rglob("*"))
    assert main(["export", str(folder)]) == 1
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("hasten: export: ") and said in line
    assert sorted(tmp_path.rglob("*")) == before


def test_a_folder_that_is_no_run_is_refused_and_runs_below_are_named(trained, capsys):
    newest = trained("vit_digits").folder
    for word, said in (("nothing", "got 'nothing'"), (str(newest.parent), f"choose one, such as {newest}")):
        assert main(["export", word]) == 1
        [line] = capsys.readouterr().err.splitlines()
        assert "expected a run folder with config.yaml" in line and said in line


def test_a_folder_that_holds_something_is_left_alone(trained, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine.txt").write_text("mine")
    assert main(["export", str(trained("vit_digits").folder), "--out", str(tmp_path / "out")]) == 1
    assert "is not empty" in capsys.readouterr().err
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "mine.txt"]


@pytest.mark.parametrize("words", [[], ["a", "b"], ["a", "--checkpoint", "newest"], ["a", "--to", "b"]])
def test_words_that_it_does_not_take_are_one_line(words, capsys):
    assert main(["export", *words]) == 1
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("hasten: export: ")
