"""Loggers that keep to the run folder: metrics.csv that survives a resume, and Weights & Biases without a prompt."""

import csv
import netrc
import os
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from lightning.fabric.loggers.csv_logs import _ExperimentWriter
from lightning.pytorch.loggers import CSVLogger, WandbLogger
from lightning.pytorch.loggers.logger import rank_zero_experiment
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from hasten.formats import whole_file


class MetricsFile(CSVLogger):
    """``<folder>/metrics.csv``: one row a logged step, continued where the file exists.

    Lightning's own CSVLogger deletes an existing metrics.csv and adds an hparams.yaml; the run folder holds
    config.yaml already.

    Example:
        >>> import tempfile
        >>> logger = MetricsFile(tempfile.mkdtemp())
        >>> logger.log_metrics({"train/loss": 0.5}, step=1)
        >>> logger.save()
        >>> sorted(os.listdir(logger.log_dir))
        ['metrics.csv']
    """

    def __init__(self, folder: str | Path) -> None:
        super().__init__(save_dir=folder, name="", version="")

    @property
    @rank_zero_experiment
    def experiment(self) -> "_AppendingWriter":  # type: ignore[override]
        """The writer behind the logger."""
        if self._experiment is None:
            self._experiment = _AppendingWriter(log_dir=self.log_dir)  # type: ignore[assignment]
        return self._experiment  # type: ignore[return-value]

    def log_hyperparams(self, params: Any = None) -> None:  # type: ignore[override]
        """Nothing: config.yaml stands beside metrics.csv."""

    def rows(self) -> int:
        """Write what is pending, and count the rows of the file; on the process that writes it."""
        self.save()
        return self.experiment.rows

    def keep(self, rows: int) -> None:
        """Drop all but the first ``rows`` rows: those after it will be logged again."""
        self.experiment.keep(rows)


class _AppendingWriter(_ExperimentWriter):
    """Lightning's writer, but an existing file is continued under its own header, and rewritten whole or not at all."""

    rows = 0

    def save(self) -> None:
        pending = len(self.metrics)
        super().save()
        self.rows += pending

    def keep(self, rows: int) -> None:
        if rows < self.rows:
            self._rewrite(self._read()[:rows])

    def _check_log_dir_exists(self) -> None:
        path = Path(self.metrics_file_path)
        if path.is_file():
            with path.open(newline="", encoding="utf-8") as file:
                self.metrics_keys = next(csv.reader(file), [])
            self.rows = len(self._read())

    def _rewrite_with_new_header(self, fieldnames: list[str]) -> None:
        self._rewrite(self._read())

    def _read(self) -> list[dict[str, str]]:
        with Path(self.metrics_file_path).open(newline="", encoding="utf-8") as file:
            return list(csv.DictReader(file))

    def _rewrite(self, rows: list[dict[str, str]]) -> None:
        with (
            whole_file(self.metrics_file_path) as unfinished,
            unfinished.open("w", newline="", encoding="utf-8") as file,
        ):
            writer = csv.DictWriter(file, fieldnames=self.metrics_keys)
            writer.writeheader()
            writer.writerows(rows)
        self.rows = len(rows)


def wandb(folder: str | Path, project: str = "hasten", *, offline: bool | None = None, **kwargs: Any) -> WandbLogger:
    """Weights & Biases in ``<folder>/wandb``; offline, with one line on how to sync, where nobody is logged in.

    Args:
        folder: the run folder.
        project: the W&B project.
        offline: None: as WANDB_MODE says, else where nobody is logged in.
        kwargs: passed on to Lightning's WandbLogger: ``name``, ``entity``, ``tags``, ``group``, ``id``, ...
    """
    why = "as asked for"
    if offline is None and "WANDB_MODE" in os.environ:
        offline = os.environ["WANDB_MODE"] == "offline"
    elif offline is None:
        offline, why = not _logged_in_to_wandb(), "no login found"
    if offline:
        _say(f"wandb: offline ({why}); to upload the run later: wandb sync {folder}/wandb/offline-*")
    Path(folder).mkdir(parents=True, exist_ok=True)  # wandb falls back to the system's temporary folder otherwise
    return WandbLogger(save_dir=folder, project=project, offline=offline, **kwargs)


@rank_zero_only
def _say(line: str) -> None:
    print(line)


def _logged_in_to_wandb() -> bool:
    """Whether wandb would find credentials. Asking wandb itself prompts, or needs the server."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    host = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    named = os.environ.get("NETRC")
    for path in [Path(named)] if named else [Path.home() / ".netrc", Path.home() / "_netrc"]:
        try:
            if netrc.netrc(path).authenticators(host):
                return True
        except (OSError, netrc.NetrcParseError):
            continue  # wandb reads it the same way: no such file, no credentials
    return False
