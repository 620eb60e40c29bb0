"""``hasten export RUN``: what a run has trained, as timm, diffusers or plain PyTorch load it, with a card.

The network is built from the run's config.yaml, without the files that it began with, and given the weights of a
checkpoint. Its kind decides the form: a model that timm has registered, one of diffusers, or any other as safetensors
beside the node of the config that builds it. A run that distilled images is exported as these.
"""

import copy
import inspect
import json
import shlex
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from hasten import registry
from hasten.commands import _words
from hasten.errors import HastenError, did_you_mean, on_one_line
from hasten.run_folders import config_of, result_of, resumes_by_files

if TYPE_CHECKING:
    from torch import nn

_STARTS_FROM: dict[str, Any] = {"checkpoint": None, "pretrained": False}
"""What a network's node says of the weights that it begins with, and what stands there when it gets others."""

_VIM = "vim_tiny_patch16_224"
"""Under this name timm makes a VisionMamba of any size."""


@dataclass(frozen=True)
class Exported:
    """What was written of a network, for the card."""

    library: str
    task: str
    load: str
    """Code that gives ``model``; FOLDER stands for where it is."""
    remarks: tuple[str, ...] = ()


def main(words: Sequence[str]) -> int:
    """Export the run that ``words`` name, and print what was written and how to load it."""
    parser = _words.parser("export", "A run's weights, config and card, in a form that timm or diffusers loads.")
    parser.add_argument("run", nargs="?", type=Path, metavar="RUN", help="a run folder")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="where to write; default: RUN/export")
    parser.add_argument("--checkpoint", choices=("best", "last"), help="default: best, or last where there is no best")
    asked = _words.parsed(parser, words)
    if asked is None:
        return 0
    if asked.run is None:
        raise HastenError("export: expected a run folder, got nothing; try: hasten export runs/EXPERIMENT/TIME_SEED")
    export(asked.run, asked.out or asked.run / "export", asked.checkpoint)
    return 0


def export(run: Path, out: Path, which: str | None = None) -> None:
    """Write what ``run`` has trained to ``out``, whole or not at all.

    Args:
        run: its folder.
        out: is made, and must be empty where it is there.
        which: "best" or "last"; None: best, or last where there is no best.

    Raises:
        HastenError: where there is no run, nothing to export, or something at ``out`` already.
    """
    config, result = config_of(run), result_of(run)
    if not config:
        runs = [path.parent for path in run.glob("*/config.yaml")] if run.is_dir() else []
        near = f"; it holds runs: choose one, such as {max(runs)}" if runs else ""
        raise HastenError(f"export: expected a run folder with config.yaml, got {str(run)!r}{near}")
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise HastenError(f"export: --out: {str(out)!r} is not empty; choose another folder or delete it")
    with _whole_folder(out) as folder:
        if (run / "distilled").is_dir():
            source, exported = _distilled(run, folder, which)
        else:
            source, exported = _network(run, config, folder, which)
        (folder / "README.md").write_text(_card(config, result, source, exported), encoding="utf-8")
        written = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    print(f"exported {source}")
    for remark in exported.remarks:
        print(f"  {remark}")
    for name in written:
        print(f"  {out / name}")
    print(f"\n{exported.load.replace('FOLDER', str(out))}")


# ------------------------------------------------------------------ networks


def _network(run: Path, config: Mapping[str, Any], folder: Path, which: str | None) -> tuple[str, Exported]:
    """Write the network of a run; what its weights are, and how to load them."""
    path = _checkpoint(run, config, which)
    node = _node(config)
    model = _built(node, config)
    state, is_average = _weights(path, model)
    model.load_state_dict(state)
    model.eval()
    averaged = ": the moving average (EMA) of the weights, as it was validated and tested" if is_average else ""
    source = f"{path.relative_to(run).as_posix()} of {run}{averaged}"
    for write in (_for_timm, _for_diffusers):
        exported = write(model, node, config, folder)
        if exported is not None:
            return source, exported
    return source, _plain(model, node, folder)


def _checkpoint(run: Path, config: Mapping[str, Any], which: str | None) -> Path:
    if config.get("task") is not None:
        raise HastenError(f"export: {str(run)!r} trained nothing: it ran the task {config['task'].get('_target_')}")
    if resumes_by_files(config):
        raise HastenError(
            f"export: expected a run of one network, got {str(run)!r}, which leaves a file for each of many"
        )
    names = [which] if which else ["best", "last"]
    paths = [run / "checkpoints" / f"{name}.ckpt" for name in names]
    path = next((path for path in paths if path.exists()), None)
    if path is None:
        status = result_of(run).get("status", "without a result.json")
        wanted = " or ".join(f"checkpoints/{path.name}" for path in paths)
        raise HastenError(f"export: expected {wanted} in {str(run)!r}, which is {status}, got none; choose another run")
    if path.is_dir():
        raise HastenError(
            f"export: expected a whole checkpoint, got {str(path)!r}, which is sharded; train with "
            "trainer.strategy.save_distributed_checkpoint=false"
        )
    return path


def _node(config: Mapping[str, Any]) -> dict[str, Any]:
    """The node of the run's network, without the weights it began with."""
    module = config.get("module") or {}
    node = module.get("model") if isinstance(module, dict) else None
    if isinstance(node, str):  # Classification takes a name of timm's
        node = {"_target_": "hasten.nn.timm_model", "model_name": node, "num_classes": module.get("num_classes")}
    if not (isinstance(node, dict) and "_target_" in node):
        target = module.get("_target_", "nothing") if isinstance(module, dict) else "nothing"
        raise HastenError(f"export: expected a network as module.model in config.yaml, got {target} without")
    return _blank(copy.deepcopy(node))


def _blank(node: Any) -> Any:
    if isinstance(node, dict):
        return {key: _STARTS_FROM.get(key, _blank(value)) for key, value in node.items()}
    return [_blank(value) for value in node] if isinstance(node, list) else node


def _built(node: Mapping[str, Any], config: Mapping[str, Any]) -> "nn.Module":
    from omegaconf import OmegaConf  # noqa: PLC0415 - seconds of import, after what can be said without
    from torch import nn  # noqa: PLC0415

    from hasten.check import build  # noqa: PLC0415

    try:
        model = build(OmegaConf.create({"module": {"model": dict(node)}}), "module.model")
    except HastenError as error:
        raise HastenError(f"export: {error}; export it with the hasten that trained it") from error
    if not isinstance(model, nn.Module):
        raise HastenError(f"export: module.model: expected a network, got {type(model).__name__}")
    return model


def _weights(path: Path, model: "nn.Module") -> tuple[dict[str, Any], bool]:
    """The network's own in a checkpoint, and whether they are an average."""
    from hasten.checkpoints import read_checkpoint  # noqa: PLC0415 - as above
    from hasten.nn.weights import check_fit  # noqa: PLC0415

    checkpoint = read_checkpoint(path, owner="export")
    prefix, found = "model.", checkpoint["state_dict"]
    state = {name.removeprefix(prefix): value for name, value in found.items() if name.startswith(prefix)}
    try:
        check_fit(state, model.state_dict(), owner=type(model).__name__, path=path)
    except ValueError as error:
        raise HastenError(f"export: {error}") from error
    return state, "current_model_state" in checkpoint


def _for_timm(model: "nn.Module", node: Mapping[str, Any], config: Mapping[str, Any], folder: Path) -> Exported | None:
    """The layout of timm's hub, for what timm has registered; None for anything else."""
    import timm  # noqa: PLC0415 - as above

    from hasten.nn import VisionMamba  # noqa: PLC0415

    known: Any = getattr(model, "pretrained_cfg", None) or {}
    apart = {"_target_", "model_name", "scan_backend", *_STARTS_FROM}
    arguments = {key: value for key, value in node.items() if key not in apart}
    is_vim = isinstance(model, VisionMamba)
    name = _VIM if is_vim else str(node.get("model_name", "")).partition(".")[0]
    if not timm.is_model(name):
        return None
    image = config.get("image") or {}
    channels, size = image.get("channels", arguments.get("in_chans", 3)), image.get("size", arguments.get("img_size"))
    normalisation, remarks = _normalisation(config.get("data") or {}, channels)
    pretrained = {
        "input_size": [channels, size, size],
        "fixed_input_size": bool(known.get("fixed_input_size", is_vim)),
        **normalisation,
        "crop_pct": 1.0,
        "classifier": "head" if is_vim else known.get("classifier"),
    }
    content = {
        "architecture": name,
        "num_classes": arguments.get("num_classes"),
        "num_features": getattr(model, "num_features", None),
        "pretrained_cfg": {key: value for key, value in pretrained.items() if value is not None},
        "model_args": arguments,
    }
    (folder / "config.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    _save(model, folder / "model.safetensors")
    load = 'import timm\n\nmodel = timm.create_model("local-dir:FOLDER", pretrained=True)'
    if is_vim:
        # timm's loader for pretrained=True is not asked for a Vim, whose own takes files
        load = (
            "import timm\n\nimport hasten.nn  # registers Vision Mamba\n\n"
            'model = timm.create_model("local-dir:FOLDER", checkpoint_path="FOLDER/model.safetensors")'
        )
    callbacks = (config.get("callbacks") or {}).values()
    for callback in (each for each in callbacks if isinstance(each, dict)):
        if callback.get("_target_") == "hasten.callbacks.TokenMerging" and callback.get("when") != "train":
            r = callback.get("r")
            remarks.append(
                f"the run merged tokens, r = {r}, and so did its test; this is the network without: "
                f"with hasten.callbacks.TokenMerging.attach(model, r={r}) it merges"
            )
    return Exported("timm", "image-classification", load, tuple(remarks))


def _normalisation(node: Mapping[str, Any], channels: int) -> tuple[dict[str, list[float]], list[str]]:
    """``mean`` and ``std`` by channel of the data that ``node`` describes, where they can be known, and remarks."""
    from omegaconf import OmegaConf  # noqa: PLC0415 - as above

    from hasten.check import build  # noqa: PLC0415
    from hasten.formats import PixelRange  # noqa: PLC0415

    remarks = ["its images were whitened (ZCA), which config.json cannot say"] if node.get("zca") else []
    try:
        # made, not read: what stands for null is in its code
        data = build(OmegaConf.create({"data": dict(node)}), "data")
        pixels = getattr(data, "unwhitened", None) or getattr(data, "pixels", None)
    except HastenError:  # its files are elsewhere by now
        pixels = None
    if isinstance(pixels, PixelRange):
        # float32 has no seventh digit
        lists = {key: [round(x, 6) for x in getattr(pixels, key).flatten().tolist()] for key in ("mean", "std")}
    else:
        named = {} if node.get("zca") else _named(node)
        lists = {key: value if isinstance(value, list) else [float(value)] for key, value in named.items()}
    if not lists:
        remarks.append("config.json has no mean and std, where timm takes ImageNet's: the data cannot be asked here")
    return {key: value * (channels if len(value) == 1 else 1) for key, value in lists.items()}, remarks


def _named(node: Mapping[str, Any]) -> dict[str, Any]:
    """``mean`` and ``std`` as a datamodule's node or else its constructor names them; nothing where one is missing."""
    from hydra.utils import get_object  # noqa: PLC0415 - as above

    try:
        parameters = inspect.signature(get_object(str(node.get("_target_")))).parameters
    except Exception:  # someone's own, which is not here
        parameters = {}
    defaults = {key: parameter.default for key, parameter in parameters.items()}
    values = {key: node.get(key, defaults.get(key)) for key in ("mean", "std")}
    return values if all(isinstance(value, (int, float, list)) for value in values.values()) else {}


def _for_diffusers(
    model: "nn.Module", node: Mapping[str, Any], config: Mapping[str, Any], folder: Path
) -> Exported | None:
    """A diffusers model with its scheduler, and how to put hasten's skip around it; None for anything else."""
    from diffusers import ModelMixin, SchedulerMixin  # noqa: PLC0415 - seconds of import

    from hasten.nn import LinearSkip  # noqa: PLC0415

    inner: Any = model.model if isinstance(model, LinearSkip) else model
    if not isinstance(inner, ModelMixin):
        return None
    inner.save_pretrained(folder)
    kind = type(inner).__name__
    load = f'from diffusers import {kind}\n\nmodel = {kind}.from_pretrained("FOLDER")'
    scheduler = _scheduler(config)
    if isinstance(scheduler, SchedulerMixin):
        scheduler.save_pretrained(folder / "scheduler")
        name = type(scheduler).__name__
        load = (
            f"from diffusers import {name}, {kind}\n\n"
            f'scheduler = {name}.from_pretrained("FOLDER", subfolder="scheduler")\n'
            f'model = {kind}.from_pretrained("FOLDER")'
        )
    remarks = []
    if inner is not model:
        remarks.append(
            f"the {kind} was trained inside hasten's LinearSkip, which adds the best linear guess of the noise to its "
            "output: alone it predicts the rest, with no pipeline of diffusers'"
        )
        load = load.replace("\n\n", "\n\nfrom hasten.nn import LinearSkip\n\n", 1)
        load += f"\nmodel = LinearSkip(model, scheduler, data_var={node['data_var']})"
    module = config.get("module") or {}
    if module.get("autoencoder") is not None:
        remarks.append(
            f"it denoises latents, scaled by {module.get('latent_scale')}, of an autoencoder not exported here"
        )
    if module.get("num_classes") is not None:
        remarks.append(
            f"call it with class_labels; {module['num_classes']}, one past the last class, stands for no label"
        )
    elif kind == "DiTTransformer2DModel":
        remarks.append(
            "call it with class_labels of zeros, which diffusers' class wants; it was trained without labels"
        )
    kind_of_task = "unconditional" if module.get("num_classes") is None else "class-conditional"
    return Exported("diffusers", f"{kind_of_task}-image-generation", load, tuple(remarks))


def _scheduler(config: Mapping[str, Any]) -> Any:
    from omegaconf import OmegaConf  # noqa: PLC0415 - as above

    from hasten.check import build  # noqa: PLC0415

    node = (config.get("module") or {}).get("noise_scheduler")
    return None if node is None else build(OmegaConf.create({"noise_scheduler": node}), "noise_scheduler")


def _plain(model: "nn.Module", node: Mapping[str, Any], folder: Path) -> Exported:
    """Weights, and the node of the config that builds what takes them."""
    (folder / "config.yaml").write_text(yaml.safe_dump(dict(node), sort_keys=False), encoding="utf-8")
    _save(model, folder / "model.safetensors")
    load = (
        "import yaml\nfrom hydra.utils import instantiate\nfrom safetensors.torch import load_file\n\n"
        'model = instantiate(yaml.safe_load(open("FOLDER/config.yaml")), _convert_="all")\n'
        'model.load_state_dict(load_file("FOLDER/model.safetensors"))'
    )
    return Exported(
        "hasten",
        "other",
        load,
        (f"{type(model).__name__} is of neither timm nor diffusers: hasten and Hydra build it",),
    )


def _save(model: "nn.Module", path: Path) -> None:
    from safetensors.torch import save_file  # noqa: PLC0415 - loads torch

    # tied weights are written under each of their names, as every loader expects
    state = {name: tensor.detach().clone().contiguous() for name, tensor in model.state_dict().items()}
    save_file(state, path, metadata={"format": "pt"})


# ------------------------------------------------------------------ distilled images


def _distilled(run: Path, folder: Path, which: str | None) -> tuple[str, Exported]:
    """Copy the set that a run has distilled, as it was written at the end of the fit, or at the last evaluation."""
    names = {"best": ["best"], "last": ["final"], None: ["best", "final"]}[which]
    found = next((run / "distilled" / name for name in names if (run / "distilled" / name).is_dir()), None)
    if found is None:
        there = [path.name for path in (run / "distilled").iterdir()]
        raise HastenError(f"export: expected distilled/{names[0]} in {str(run)!r}, got none{did_you_mean('', there)}")
    from hasten.formats import Distilled  # noqa: PLC0415 - loads torch

    Distilled.read(found)  # what is broken is not passed on
    shutil.copytree(found, folder, dirs_exist_ok=True)
    load = (
        "from hasten.formats import Distilled\n\n"
        'distilled = Distilled.read("FOLDER")  # images, label_logits, syn_lr; pixels.denormalize shows them'
    )
    return f"distilled/{found.name} of {run}", Exported("hasten", "other", load)


# ------------------------------------------------------------------ the card


def _card(config: Mapping[str, Any], result: Mapping[str, Any], source: str, exported: Exported) -> str:
    """A model card: front matter as hubs read it, how to load, what it reached, and how it was made."""
    experiment = str(config.get("experiment", "run"))
    methods = registry.methods_used(config, experiment)
    data = str((config.get("data") or {}).get("_target_", "unknown")).rpartition(".")[2].lower()
    metrics: dict[str, float] = result.get("metrics", {})
    shown = {
        name: value for name, value in metrics.items() if name.startswith(("test/", "eval/", "sample/"))
    } or metrics
    front = {
        "library_name": exported.library,
        "tags": ["hasten", *([] if exported.task == "other" else [exported.task]), *(card.name for card in methods)],
        "datasets": [data],
        "metrics": sorted(shown),
    }
    parts = [f"---\n{yaml.safe_dump(front, sort_keys=False)}---\n# {experiment}"]
    status = result.get("status", "unknown")
    parts.append(f"From {source}." + ("" if status == "complete" else f" The run is {status}."))
    parts += [f"{remark[0].upper()}{remark[1:]}." for remark in exported.remarks]
    # the folder may move: whoever reads the card stands in it
    parts.append(f"## Load\n\n```python\n{exported.load.replace('FOLDER/', '').replace('FOLDER', '.')}\n```")
    if shown:
        rows = "\n".join(f"| {name} | {value:.4g} |" for name, value in shown.items())
        parts.append(f"## Result\n\n| metric | value |\n|---|---|\n{rows}")
    command = shlex.join(["python", "train.py", *map(str, config.get("overrides", []))])
    versions = ", ".join(f"{name} {number}" for name, number in result.get("versions", {}).items())
    parts.append(f"## How it was made\n\n    {command}\n\nSeed {config.get('seed')}; {versions or 'versions unknown'}.")
    cited = [_cited(card, experiment) for card in methods]
    if cited:
        parts.append("## Citation\n\n" + "\n\n".join(cited))
    return "\n\n".join(parts) + "\n"


def _cited(card: registry.Card, experiment: str) -> str:
    """The paper of what ran, with its BibTeX where that is the card's own."""
    paper = card.paper_of(experiment)
    _, _, citation = card.text.partition("## Citation\n")
    return f"{paper}\n\n{citation}".strip() if paper == card.front["paper"] else paper


# ------------------------------------------------------------------ output


@contextmanager
def _whole_folder(out: Path) -> Iterator[Path]:
    """A folder beside ``out`` that takes its place when the block ends well, and vanishes when it does not."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        unfinished = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    except OSError as error:
        raise HastenError(f"export: --out: cannot write to {str(out)!r}: {error.strerror}") from error
    try:
        yield unfinished
        unfinished.chmod(0o755)  # mkdtemp makes folders for their owner alone
        unfinished.replace(out)  # an empty folder gives way
    except OSError as error:
        raise HastenError(f"export: cannot write {str(out)!r}: {on_one_line(error.strerror or error)}") from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
