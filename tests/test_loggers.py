import csv

import pytest

from hasten.loggers import MetricsFile, _logged_in_to_wandb, wandb


def _rows(folder):
    with (folder / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_metrics_go_to_one_file_and_nothing_else(tmp_path):
    logger = MetricsFile(tmp_path)
    logger.log_hyperparams({"lr": 0.1})
    logger.log_metrics({"train/loss": 0.5}, step=1)
    logger.log_metrics({"val/acc": 0.25}, step=2)
    logger.finalize("success")
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.csv"]
    assert _rows(tmp_path) == [
        {"step": "1", "train/loss": "0.5", "val/acc": ""},
        {"step": "2", "train/loss": "", "val/acc": "0.25"},
    ]


def test_an_existing_file_is_continued_also_with_new_columns(tmp_path):
    for step, metrics in enumerate([{"a": 1.0}, {"a": 2.0}, {"b": 3.0}]):
        logger = MetricsFile(tmp_path)
        logger.log_metrics(metrics, step=step)
        logger.finalize("success")
    assert [(row["step"], row["a"], row.get("b")) for row in _rows(tmp_path)] == [
        ("0", "1.0", ""),
        ("1", "2.0", ""),
        ("2", "", "3.0"),
    ]


@pytest.fixture
def _nobody(monkeypatch, tmp_path):
    for name in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE", "WANDB_BASE_URL", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))


@pytest.mark.usefixtures("_nobody")
def test_a_login_is_a_key_in_the_environment_or_in_netrc(monkeypatch, tmp_path):
    assert not _logged_in_to_wandb()
    (tmp_path / ".netrc").write_text("machine example.com login user password x\n")
    assert not _logged_in_to_wandb()
    (tmp_path / ".netrc").write_text("machine api.wandb.ai login user password x\n")
    (tmp_path / ".netrc").chmod(0o600)
    assert _logged_in_to_wandb()
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example.com")
    assert not _logged_in_to_wandb()
    monkeypatch.setenv("WANDB_API_KEY", "x")
    assert _logged_in_to_wandb()


@pytest.mark.usefixtures("_nobody")
def test_without_a_login_wandb_is_offline_and_says_how_to_sync(monkeypatch, tmp_path, capsys):
    monkeypatch.delenv("WANDB_MODE", raising=False)
    logger = wandb(tmp_path / "run")
    assert logger._wandb_init["mode"] == "offline"
    assert capsys.readouterr().out == (
        f"wandb: offline (no login found); to upload the run later: wandb sync {tmp_path}/run/wandb/offline-*\n"
    )
