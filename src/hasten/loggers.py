"""Loggers that keep to the run folder: metrics.csv that survives a resume, and Weights & Biases without a prompt."""

import csv
import netrc
import os
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from lightning.fabric.loggers.csv_logs import _ExperimentWriter
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, WandbLogger
from lightning.pytorch.loggers.logger import rank_zero_experiment
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from hasten.errors import HastenError, on_one_line
from hasten.formats import whole_file, write_json
from hasten.run_folders import read_json


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
            self.rows = len(self._read())
            with path.open(newline="", encoding="utf-8") as file:
                self.metrics_keys = next(csv.reader(file), [])

    def _rewrite_with_new_header(self, fieldnames: list[str]) -> None:
        self._rewrite(self._read())

    def _read(self) -> list[dict[str, str]]:
        try:
            with Path(self.metrics_file_path).open(newline="", encoding="utf-8") as file:
                rows = list(csv.DictReader(file))
            if any(None in row for row in rows):
                raise ValueError("a row is longer than the header")
        except (ValueError, csv.Error) as error:
            raise HastenError(
                f"metrics.csv: expected the rows of this run, cannot read {self.metrics_file_path!r}: "
                f"{on_one_line(error)}; move it away to go on"
            ) from error
        return rows

    def _rewrite(self, rows: list[dict[str, str]]) -> None:
        with (
            whole_file(self.metrics_file_path) as unfinished,
            unfinished.open("w", newline="", encoding="utf-8") as file,
        ):
            writer = csv.DictWriter(file, fieldnames=self.metrics_keys)
            writer.writeheader()
            writer.writerows(rows)
        self.rows = len(rows)


def wandb(
    folder: str | Path,
    project: str = "hasten",
    *,
    name: str | None = None,
    group: str | None = None,
    offline: bool | None = None,
    **kwargs: Any,
) -> WandbLogger:
    """Weights & Biases in ``<folder>/wandb``; offline, with one line on how to sync, where nobody is logged in.

    A folder is one W&B run: ``<folder>/wandb/run.json`` keeps its id, name and group, and whoever logs to the folder
    again goes on with it. Nothing is written outside of the folder, and nothing is ever asked on the terminal.

    Args:
        folder: the run folder.
        project: the W&B project.
        name: what W&B shows; None: the end of the folder's path.
        group: runs that W&B shows together, as those of a sweep.
        offline: None: as WANDB_MODE says, else where nobody is logged in.
        kwargs: passed on to Lightning's WandbLogger: ``log_model``, and ``entity``, ``tags``, ... of ``wandb.init``.

    Raises:
        HastenError: where the run is to be online and nobody is logged in.

    Example:
        >>> import tempfile
        >>> logger = wandb(tempfile.mkdtemp(), name="first", offline=True)
        wandb: offline (as asked for); to upload the run later: wandb sync .../wandb/offline-*
        >>> logger.name, len(logger.version)
        ('hasten', 8)
    """
    mode, why = _mode(offline)
    if mode == "offline":
        _say(f"wandb: offline ({why}); to upload the run later: wandb sync {folder}/wandb/offline-*")
    return _WandbOfFolder(Path(folder), project=project, name=name, group=group, mode=mode, **kwargs)


class _WandbOfFolder(WandbLogger):
    """Lightning's, but all that wandb writes stands in one folder, whose run goes on under its id."""

    def __init__(self, folder: Path, *, id: str | None = None, **kwargs: Any) -> None:
        self._known = folder / "wandb" / "run.json"
        known = read_json(self._known)
        # not by a generator that a seed rules: two runs of one seed are two runs
        self._identity = {"id": id or known.get("id") or secrets.token_hex(4)}
        names = {"name": "/".join(folder.absolute().parts[-2:]), "group": None}
        self._identity |= {key: kwargs.pop(key, None) or known.get(key) or names[key] for key in names}
        super().__init__(save_dir=folder, **self._identity, **kwargs)
        if self._wandb_init.get("anonymous") is None:
            self._wandb_init.pop("anonymous", None)  # newer releases of wandb warn of it, also where it is None

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """The W&B run, begun when it is first asked for."""
        if self._experiment is None:
            self._known.parent.mkdir(parents=True, exist_ok=True)  # wandb would choose a temporary folder
            write_json(self._known, self._identity)
            with self._inside():
                return super().experiment
        return self._experiment

    def log_table(self, *args: Any, **kwargs: Any) -> None:
        with self._inside():
            super().log_table(*args, **kwargs)

    @rank_zero_only
    def log_files(self, kind: str, files: Mapping[str, Path]) -> None:
        """Log copies of name -> file or folder as one artifact, ``<kind>-<id>``."""
        from wandb import Artifact  # noqa: PLC0415 - slow to import, and only where wandb is asked for

        with self._inside():
            artifact = Artifact(f"{kind}-{self.version}", type=kind)
            for name, path in files.items():
                if path.is_dir():
                    artifact.add_dir(str(path), name=name, skip_cache=True)
                else:
                    artifact.add_file(str(path), name=name, skip_cache=True)
            self.experiment.log_artifact(artifact)

    def after_save_checkpoint(self, checkpoint_callback: ModelCheckpoint) -> None:
        with self._inside():
            super().after_save_checkpoint(checkpoint_callback)

    def finalize(self, status: str) -> None:
        with self._inside():
            super().finalize(status)

    @contextmanager
    def _inside(self) -> Iterator[None]:
        """Where wandb begins and where it copies files: what it would put into the home folder goes to the run's."""
        keys = ["WANDB_CACHE_DIR", "WANDB_DATA_DIR"]
        if not Path(os.environ.get("WANDB_CONFIG_DIR", "~/.config/wandb")).expanduser().exists():
            keys.append("WANDB_CONFIG_DIR")  # wandb would make it; one that is there holds the user's settings
        before = {key: os.environ.get(key) for key in keys}
        os.environ.update(dict.fromkeys(keys, str((self._known.parent / "own").absolute())))
        try:
            yield
        finally:
            for key, value in before.items():
                os.environ.pop(key, None)
                os.environ.update({} if value is None else {key: value})


def _mode(offline: bool | None) -> tuple[str | None, str]:
    """W&B's mode, None where its own settings decide, and why."""
    asked = {None: os.environ.get("WANDB_MODE"), True: "offline", False: "online"}[offline]
    mode = {"dryrun": "offline", "run": "online"}.get(asked, asked) if asked else None
    if mode is None:
        return (None, "") if _logged_in_to_wandb() else ("offline", "no login found")
    if mode in ("online", "shared") and not _logged_in_to_wandb():
        raise HastenError(
            f"expected a login for mode {mode!r}, found none; run `wandb login`, set WANDB_API_KEY, or "
            "leave the mode out to log offline"
        )
    return mode, "as asked for"


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
