"""``hasten show EXPERIMENT``: every value with the file it comes from, then what the run would cost here."""

from pathlib import Path

import pytest
import yaml
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import OmegaConf

from hasten.cli import main
from hasten.commands.show import value_sources
from hasten.run import compose

CONFIGS = Path(__file__).parents[2] / "src/hasten/configs"


@pytest.fixture(autouse=True)
def _own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)


def _printed(capsys, *words: str) -> str:
    assert main(["show", *words]) == 0
    return capsys.readouterr().out


def test_every_value_names_the_file_that_set_it_last():
    sources = value_sources(["experiment=edf_digits", "seed=3", "+data.flipped=true", "model=vim"])
    assert sources["seed"] == sources["data.flipped"] == "command line"
    assert sources["trainer.max_steps"] == "experiment/edf_digits.yaml"
    assert sources["module.mask.alpha"] == "experiment/edf_digits.yaml"  # null in the module's own file
    assert sources["module.momentum_img"] == "module/trajectory_matching.yaml"
    assert sources["callbacks.skip_guard.patience"] == "callbacks/skip_guard.yaml"
    assert sources["callbacks.best.every_n_train_steps"] == "callbacks/dataset_distillation.yaml"
    assert sources["optimizer.weight_decay"] == "optimizer/adamw.yaml"
    assert sources["precision"] == "train.yaml"
    assert not any(key.startswith(("hydra.", "defaults")) for key in sources)


def test_what_is_deleted_comes_from_no_command_line():
    words = ["experiment=edf_digits", "~callbacks.skip_guard", "~optimizer.weight_decay"]
    assert "command line" not in value_sources(words).values()


# of each kind one
@pytest.mark.parametrize("name", ["speed_cifar10_cfg", "pad_digits", "mip_segmentation_digits", "rmeeto_digits"])
def test_the_sources_of_an_experiment_are_files_that_hold_its_values(name):
    """One leaf after the other: the file that is named for it has that value."""
    sources = value_sources([f"experiment={name}"])
    plain = OmegaConf.to_container(compose([f"experiment={name}"]))
    files: dict[str, str] = {}

    def leaves(node, above=""):
        for key, value in node.items():
            if isinstance(value, dict) and value:
                yield from leaves(value, f"{above}{key}.")
            else:
                yield f"{above}{key}", key, value

    for key, last, _ in leaves({key: plain[key] for key in plain if key not in ("experiment", "overrides")}):
        text = files.setdefault(sources[key], (CONFIGS / sources[key]).read_text(encoding="utf-8"))
        assert f"{last}:" in text, (key, sources[key])


def test_it_prints_yaml_that_composes_to_the_same(capsys):
    printed = _printed(capsys, "speed_digits", "seed=3", "--no-cost")
    composed = OmegaConf.to_container(compose(["experiment=speed_digits", "seed=3"]))
    assert yaml.safe_load(printed) == {key: composed[key] for key in composed if key not in ("experiment", "overrides")}
    lines = printed.splitlines()
    assert lines[0] == "# python train.py experiment=speed_digits seed=3"
    (seed,) = [line for line in lines if line.startswith("seed:")]  # data.seed stands further in
    assert seed.split("  # ") == [f"{'seed: 3':<60}", "command line"]
    found = {line.split(":")[0].strip(): line.partition("# ")[2] for line in lines}
    assert found["sample_steps"] == "experiment/speed_digits.yaml"
    assert found["data_var"] == "model/unet_skip.yaml: 0.717"  # what ${image.mean_square} stands for


def test_without_further_words_it_tells_the_cost_and_what_is_written(capsys):
    words = compose(["experiment=classify_digits"]).tiny
    printed = _printed(capsys, "classify_digits", *words)
    assert "\nclassify_digits\n  parameters    10,986\n" in printed
    assert "checkpoints/best.ckpt  1" in printed
    assert list(Path().iterdir()) == []


def test_one_process_of_several_prints_it(capsys, monkeypatch):
    monkeypatch.setattr(rank_zero_only, "rank", 1)
    assert _printed(capsys, "classify_digits", *compose(["experiment=classify_digits"]).tiny) == ""


def test_what_is_yet_to_be_given_is_shown(capsys):
    printed = _printed(capsys, "import_buffer", "--no-cost")
    assert "source: ???" in printed


def test_an_experiment_of_a_folder_of_ones_own_is_shown(capsys, tmp_path):
    (tmp_path / "mine/experiment").mkdir(parents=True)
    (tmp_path / "mine/experiment/own.yaml").write_text(
        "# @package _global_\n# Mine.\ndefaults:\n  - override /model: convnet\nseed: 7\n"
    )
    printed = _printed(capsys, "own", f"hydra.searchpath=[file://{tmp_path}/mine]", "--no-cost")
    assert any(line.split() == ["seed:", "7", "#", "experiment/own.yaml"] for line in printed.splitlines())


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["speed_digit"], "experiment: there is no 'speed_digit'; did you mean 'speed_digits'?"),
        (["speed_digits", "sead=3"], "sead: there is no such key; did you mean 'seed'?"),
        (["classify_digits", "+modle=unet"], "modle: nothing here reads this key; did you mean 'module'?"),
        (["classify_digits", "optimizer.lr=high"], "optimizer.lr: expected float"),
        (
            ["speed_digits", "edf_digits"],
            "show: expected one experiment, then key=value, got 'speed_digits edf_digits'",
        ),
        ([], "show: expected an experiment, got none"),
        (["speed_digits", "--cost"], "show: unrecognized arguments: --cost"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_mistake_is_one_line_and_exit_code_1(words, line, capsys):
    assert main(["show", *words]) == 1
    (printed,) = capsys.readouterr().err.splitlines()
    assert printed.startswith(f"hasten: {line}"), printed
