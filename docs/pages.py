"""Writes the table of methods in README.md, and benchmarks/README.md: `make pages`, after a card or result has changed.

What they say comes from the front matter of the cards and from benchmarks/results/*.json alone; tests/test_pages.py
holds them to it. docs/_pages is not written here: conf.py does that at each build.
"""

import ast
import json
import math
import re
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from hasten import registry

ROOT = Path(__file__).parents[1]
BENCHMARKS = ROOT / "benchmarks"
BEGIN, END = "<!-- methods: `make pages` writes this table from the cards -->", "<!-- end of methods -->"

BASES = ("block", "r = 0", "unbind loop", "full", "floor", "hyperlight", "target")
"""Arms beside which the times and sizes of a claim's other arms are set; where it has several, the first of these."""

CONTROLS = {
    "eval/random/acc": "random images, hard labels",
    "eval/random_soft/acc": "random images, the experts' labels",
    "eval/whole/acc": "all training images",
}
"""Controls that edf.py measures within the runs of DATM."""

ZONES = ("t <= 500", "t >= 700")
"""The two ends of the noise levels, which speed.py measures beside their mean."""

INTRODUCTION = """\
# Benchmarks

Written by `make pages` from `results/*.json`: every row that was measured, the disappointing ones too. What can be read
from them, and what cannot, is said in the cards."""

LEGEND = """\
Below, `ours` is a mean ± the standard deviation over seeds where there are several. `ratio` is a time or a size divided
by that of the claim's base. `paper's` is the paper's figure for that very row, `-` where it has none. `run` is the
command beneath the table that measured the row; typed again it goes on from the file of results, and with `--fresh` it
measures all of it anew."""


def main() -> None:
    """Write both files."""
    readme = ROOT / "README.md"
    readme.write_text(with_methods(readme.read_text(encoding="utf-8")), encoding="utf-8")
    (BENCHMARKS / "README.md").write_text(benchmarks_page(), encoding="utf-8")


# ------------------------------------------------------------------ the table of methods


def with_methods(readme: str) -> str:
    """The README with the table of methods as the cards have it."""
    before, _, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not end:
        raise SystemExit(f"README.md: expected the lines {BEGIN} and {END}, got none; put them where the table belongs")
    return f"{before}{BEGIN}\n{_methods_table()}\n{END}{after}"


def _methods_table() -> str:
    keys = ("saves", "costs", "evidence_here")
    rows = ([_link(card), *(card.front[key] for key in keys), _arxiv(card)] for card in _methods())
    return _table(["method", "saves", "costs", "evidence here", "paper"], rows)


def _methods() -> list[registry.Card]:
    return [card for card in registry.cards().values() if card.kind == "method"]


def _link(card: registry.Card, up: str = "") -> str:
    """The title of a card, as a link by its true path: GitHub does not follow the link ``cards``."""
    return f"[{card.title}]({up}src/hasten/cards/{card.name}.md)"


def _arxiv(card: registry.Card) -> str:
    number = re.search(r"arXiv:(\d+\.\d+)", card.front["paper"])
    return f"[{number[1]}](https://arxiv.org/abs/{number[1]})" if number else card.front["paper"]


# ------------------------------------------------------------------ the benchmarks' page


def benchmarks_page() -> str:
    """All of benchmarks/README.md."""
    measured: dict[str, list[Path]] = {}
    for path in sorted((BENCHMARKS / "results").glob("*.json")):
        measured.setdefault(_script(_read(path)["rows"][0]), []).append(path)
    scripts = sorted(path.stem for path in BENCHMARKS.glob("*.py") if "__main__" in path.read_text(encoding="utf-8"))
    waiting = [f"- [{name}.py]({name}.py): {_first_line(name)}" for name in scripts if name not in measured]
    parts = [INTRODUCTION, _claims(measured), LEGEND]
    for script, paths in sorted(measured.items()):
        parts += [f"## {script}", _first_line(script), *map(_result, paths)]
    return "\n\n".join([*parts, "## Not measured yet", "\n".join(waiting)]) + "\n"


def _claims(measured: Iterable[str]) -> str:
    """A row a method: what its paper says, what was found here, and by which scripts."""

    def script(path: str) -> str:
        name = Path(path).stem
        return f"[{name}](#{name})" if name in measured else f"{name} (not yet)"

    header = ["method", "the paper's figures, not measured here", "here", "scripts"]
    rows = (
        [_link(card, "../"), card.front["paper_reports"], card.front["evidence_here"]]
        + [", ".join(map(script, card.front["benchmark"]))]
        for card in _methods()
    )
    return _table(header, rows)


def _result(path: Path) -> str:
    """One file of results: its table, the runs that it comes from, its picture."""
    results = _read(path)
    runs = "\n".join(f"{number}. {run}" for number, run in enumerate(_runs(results["rows"]), start=1))
    parts = [f"[{path.name}](results/{path.name})", results_table(results), runs]
    if path.with_suffix(".png").exists():
        parts.append(f"![{path.stem}](results/{path.stem}.png)")
    return "\n\n".join(parts)


def results_table(results: Mapping[str, Any]) -> str:
    """The rows of a file of results: the seeds of an arm as one, the arms of a claim together."""
    runs = _runs(results["rows"])
    claims: dict[str, dict[str, dict[int | None, dict[str, Any]]]] = {}
    for row in _all_rows(results):
        arm = row["arm"] if row.get("step") is None else f"{row['arm']}, step {row['step']:g}"
        # a seed once: the controls of edf.py stand in several of its rows
        claims.setdefault(row["claim"], {}).setdefault(arm, {})[row["seed"]] = row
    lines = []
    for claim, arms in claims.items():
        base = next((arm for arm in BASES if arm in arms), None)
        for arm, by_seed in arms.items():
            rows = list(by_seed.values())
            line = [
                _spread([row["value"] for row in rows]),
                rows[0]["unit"] or "-",
                _ratio(rows[0], None if base is None else next(iter(arms[base].values()))),
                _spread([rows[0]["paper_value"]]),
                ", ".join(str(seed) for seed in by_seed if seed is not None) or "-",
                ", ".join(sorted({str(runs.index(_run(row)) + 1) for row in rows})),
            ]
            lines.append([claim if arm == next(iter(arms)) else "", arm, *line])
    return _table(["claim", "arm", "ours", "unit", "ratio", "paper's", "seeds", "run"], lines)


def _all_rows(results: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """The rows, and what else some of them hold that a reader has to see."""
    for row in results["rows"]:
        yield row
        if row.get("name") == "datm":
            found = {arm: row["metrics"][metric] for metric, arm in CONTROLS.items() if metric in row["metrics"]}
            yield from ({**row, "arm": arm, "value": value} for arm, value in found.items())
        if "zones" in row and row["step"] == results["protocol"]["steps"]:
            yield from ({**row, "claim": f"{row['claim']}, {zone}", "value": row["zones"][zone]} for zone in ZONES)


def _ratio(row: Mapping[str, Any], base: Mapping[str, Any] | None) -> str:
    if base is None or not ("ratio" in row or (row["unit"] or "").startswith(("ms", "MB"))):
        return "-"
    if base is row:
        return "base"
    if "ratio" in row:
        return f"{row['ratio']:.2f}x (by FLOPs {row['predicted_ratio']:.2f}x)"
    return f"{row['value'] / base['value']:.2f}x"


def _spread(values: Sequence[Any]) -> str:
    """Mean ± standard deviation, to two digits of the latter; one value to four."""
    if values[0] is None:
        return "-"
    if isinstance(values[0], bool):
        return "yes" if values[0] else "no"
    mean, deviation = statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0
    if deviation == 0:
        return f"{mean:.4g}"
    decimals = max(0, 1 - math.floor(math.log10(deviation)))
    return f"{mean:.2g} ± {deviation:.2g}" if decimals > 8 else f"{mean:.{decimals}f} ± {deviation:.{decimals}f}"


def _runs(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """What the rows come from, each once, in the order of the rows."""
    return list(dict.fromkeys(map(_run, rows)))


def _run(row: Mapping[str, Any]) -> str:
    machine = row["machine"]
    where = f"{machine['cpu']}, {machine['cores']} cores, {machine['gpu'] or 'no GPU'}"
    versions = ", ".join(f"{name} {version}" for name, version in row["versions"].items())
    return f"`{row['command']}` at {row['commit']}: {where}; {versions}"


def _script(row: Mapping[str, Any]) -> str:
    """The stem of the script that measured a row."""
    return Path(row["command"].split()[1]).stem


def _first_line(script: str) -> str:
    doc = ast.get_docstring(ast.parse((BENCHMARKS / f"{script}.py").read_text(encoding="utf-8")))
    return (doc or "").partition("\n")[0]


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *([cell.replace("|", r"\|") for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    main()
