"""Recipes, whatever decides what a file or folder holds, as nested mappings for JSON: a hash, and how two differ."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from typing import Any


def recipe_hash(recipe: Mapping[str, Any]) -> str:
    """12 hex digits that are equal for equal recipes, whatever the order of their keys.

    Example:
        >>> recipe_hash({"lr": 0.01, "seed": 0}) == recipe_hash({"seed": 0, "lr": 0.01})
        True
    """
    canonical = json.dumps(recipe, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()[:12]


def recipe_difference(one: Mapping[str, Any], other: Mapping[str, Any], *, shown: int = 3) -> str:
    """Where two recipes differ, in words: ``optimizer.lr (0.01 and 0.1)``; at most ``shown`` keys.

    Example:
        >>> recipe_difference({"optimizer": {"lr": 0.01}, "seed": 0}, {"optimizer": {"lr": 0.1}, "seed": 0})
        'optimizer.lr (0.01 and 0.1)'
    """
    # through JSON, as one of the two may come from a file: it knows no tuples
    left, right = (dict(_leaves(json.loads(json.dumps(recipe)))) for recipe in (one, other))
    pairs = {key: (left.get(key, "nothing"), right.get(key, "nothing")) for key in left | right}
    keys = [key for key, (here, there) in pairs.items() if here != there]
    parts = [f"{key} ({pairs[key][0]} and {pairs[key][1]})" for key in keys[:shown]]
    return ", ".join(parts) + (f" and {len(keys) - shown} more" if len(keys) > shown else "")


def data_difference(one: Mapping[str, Any], other: Mapping[str, Any]) -> str:
    """Where two descriptions of data sets differ in what an image is and which ones are held out; "" if they do not.

    In which batches and how augmented the images were seen makes no difference.

    Example:
        >>> data_difference({"split": "1f", "batch_size": 128}, {"split": "2e", "batch_size": 256})
        'split (1f and 2e)'
    """
    keys = (one.keys() & other.keys()) - {"augmentation", "batch_size", "seed"}
    return recipe_difference({key: one[key] for key in sorted(keys)}, {key: other[key] for key in sorted(keys)})


def _leaves(node: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted key and value of everything in nested dicts."""
    if not isinstance(node, Mapping):
        yield prefix, node
        return
    for key, value in node.items():
        yield from _leaves(value, f"{prefix}.{key}" if prefix else str(key))
