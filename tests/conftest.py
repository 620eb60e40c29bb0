"""One thread, no network, no window: what every test may rely on."""

import importlib.util
import json
import os
import struct
from pathlib import Path
from types import SimpleNamespace

os.environ.setdefault("MPLBACKEND", "Agg")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "offline")

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _one_thread_and_the_same_draws():
    """Two contended threads run many times slower than one; a test that draws draws the same each time."""
    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def two_processes():
    """``two_processes(function, *args)`` -> what the function returns on each of two gloo ranks; see the file."""
    # loaded by its path: tests are no package, and the processes run the same file as a script
    spec = importlib.util.spec_from_file_location("two_processes", Path(__file__).with_name("two_processes.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    pool = module.TwoProcesses()
    yield pool
    pool.stop()


@pytest.fixture(scope="session")
def wandb_runs():
    """``wandb_runs(folder)`` -> what Weights & Biases would be sent of ``<folder>/wandb``, oldest first."""

    def records(path):
        """The log of LevelDB: blocks of 32 KiB, and records in pieces with a head of (checksum, length, kind)."""
        from wandb.proto.wandb_internal_pb2 import Record

        data, at, whole = path.read_bytes(), 7, b""
        assert data[:4] == b":W&B"
        while at + 7 <= len(data):
            left = 2**15 - at % 2**15
            if left < 7:
                at += left
                continue
            _, length, kind = struct.unpack("<IHB", data[at : at + 7])
            whole += data[at + 7 : at + 7 + length]
            at += 7 + length
            if kind in (1, 4):  # a whole one, or its last piece
                yield Record.FromString(whole)
                whole = b""

    def put(into, items):
        """Each item a key, or a path of keys, and its value."""
        for item in items:
            *parents, last = item.nested_key or [item.key]
            node = into
            for key in parents:
                node = node.setdefault(key, {})
            node[last] = json.loads(item.value_json)
        return into

    def run(path):
        found = SimpleNamespace(
            config={}, summary={}, history=[], artifacts={}, exit_code=None, files=path.parent / "files"
        )
        for record in records(path):
            match record.WhichOneof("record_type"):
                case "run":
                    found.id, found.name = record.run.run_id, record.run.display_name
                    found.group, found.project = record.run.run_group, record.run.project
                case "config":
                    put(found.config, record.config.update)
                case "summary":
                    put(found.summary, record.summary.update)
                case "history":
                    found.history.append(put({}, record.history.item))
                case "artifact":
                    files = {entry.path: Path(entry.local_path) for entry in record.artifact.manifest.contents}
                    found.artifacts[record.artifact.type] = files
                case "exit":
                    found.exit_code = record.exit.exit_code
        return found

    return lambda folder: [run(path) for path in sorted(Path(folder).glob("wandb/offline-run-*/run-*.wandb"))]
