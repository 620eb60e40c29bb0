"""Run by CI inside an installed wheel: imports every subpackage and reads every config, away from the clone."""

import importlib
import pkgutil
import sys
from importlib.resources import files
from pathlib import Path

import yaml


def main(site: str) -> None:
    import hasten

    home = Path(hasten.__file__).parent
    if home.parent != Path(site):
        raise SystemExit(f"expected hasten from the wheel in {site}, got {home}")
    modules = [module.name for module in pkgutil.walk_packages(hasten.__path__, "hasten.")]
    for name in modules:
        importlib.import_module(name)
    configs = list(home.glob("configs/**/*.yaml"))
    for path in configs:
        yaml.safe_load(path.read_text(encoding="utf-8"))
    cards = [card.name for card in files("hasten").joinpath("cards").iterdir() if card.name.endswith(".md")]
    if len(modules) < 20 or len(configs) < 20 or not cards:
        raise SystemExit(f"expected a whole package, got {len(modules)} modules, {len(configs)} configs, cards {cards}")
    print(f"wheel: {len(modules)} modules, {len(configs)} configs and {len(cards)} cards stand without the clone")


if __name__ == "__main__":
    main(sys.argv[1])
