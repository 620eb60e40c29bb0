"""The benchmark of MIP at a tiny size: what its arms share, what it writes, and what its check names."""

import importlib
import json
from itertools import product
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
KEYS = {"claim", "arm", "seed", "value", "unit", "paper_value", "machine", "versions", "commit", "command"}


@pytest.fixture
def mip(monkeypatch):  # scripts find each other by the folder they lie in
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module("mip")


def test_the_variants_of_a_seed_share_theta0_or_have_none(mip):
    built = {variant: mip.build(variant, 0, 1, (4, 4, 4)) for variant in mip.VARIANTS}
    wanted = mip.network(0, 1, (4, 4, 4)).state_dict()
    for variant in ("residual_only", "mip", "mip_basis8"):
        assert all(value.equal(wanted[name]) for name, value in built[variant].model.state_dict().items())
    for variant in ("default", "encoding_only"):
        assert not any(built[variant].model.get_parameter(name).any() for name in built[variant].names)
    kernel = built["torch_init"].model.get_parameter("0.weight")
    assert 0 < kernel.abs().max() <= 128**-0.5
    assert not mip.network(1, 1, (4, 4, 4))[0].weight.equal(wanted["0.weight"])


def test_the_network_alone_is_never_told_the_angle(mip):
    images, plain = torch.rand(2, 1, 8, 8), mip.build("plain", 0, 1, (4, 4, 4))
    assert plain(images, angle=torch.tensor(0.0)).equal(plain(images, angle=torch.tensor(90.0)))


def test_it_goes_on_where_it_was_stopped_and_writes_rows_a_plot_and_a_table(mip, tmp_path, capsys):
    arguments = ["--dry-run", "--workers", "1", "--seeds", "0", "--out", str(tmp_path), "--variants"]
    mip.main([*arguments, "mip"])
    kept = json.loads((tmp_path / "mip_convergence_digits.json").read_text())["rows"]
    mip.main([*arguments, "mip,default"])
    rows = json.loads((tmp_path / "mip_convergence_digits.json").read_text())["rows"]
    assert rows[: len(kept)] == kept and len(rows) == 2 * len(mip.OPTIMIZERS)
    assert all(row.keys() >= KEYS and len(row["curve"]) == 2 and len(row["by_angle"]) == 9 for row in rows)
    assert (tmp_path / "mip_convergence_digits.png").stat().st_size > 10_000
    assert "| default |" in capsys.readouterr().out


def _empty(data):
    protocol = {"data": data, "sizes": {"trained": 0.5, "target": 0.8}}
    return importlib.import_module("common").Results(Path("none.json"), protocol, "")


def _results(mip, default, trained, *, data="pets", by=500):
    """Rows of one seed: (accuracy, loss) of default under SGD and Adam, and of mip, which has it by a step."""
    results = importlib.import_module("common").Results(
        Path("none.json"), {"data": data, "sizes": {"trained": 0.5}}, ""
    )
    for variant, by_kind in (("default", default), ("mip", trained)):
        for optimizer, (kind, _) in mip.OPTIMIZERS.items():
            accuracy, loss = by_kind[kind]
            row = {"claim": mip.CLAIM, "variant": variant, "optimizer": optimizer, "seed": 0}
            results.rows.append(row | {"accuracy": accuracy, "value": loss, "curve": [[by, accuracy]]})
    return results


def test_the_check_names_what_is_not_shown(mip):
    trained = {"sgd": (0.9, 0.3), "adam": (0.9, 0.3)}
    assert mip.failures(_results(mip, {"sgd": (0.1, 2.3), "adam": (0.8, 0.5)}, trained)) == []
    found = mip.failures(_results(mip, {"sgd": (0.4, 1.8), "adam": (0.9, 0.2)}, trained))
    assert found[0] == (
        "SGD 0.03, seed 0: expected accuracies of at most 0.15 for default and at least 0.5 for mip, got 0.40 and 0.90"
    )
    assert found[2] == "Adam 2e-3: expected a lower mean loss for mip than for default, got 0.30 and 0.20"
    assert len(found) == 4


def test_the_check_of_the_digits_asks_when_mip_is_trained_and_how_well(mip):
    default = {"sgd": (0.1, 2.3), "adam": (0.6, 0.9)}
    slow = mip.failures(_results(mip, default, {"sgd": (0.9, 0.3), "adam": (0.84, 0.3)}, data="digits", by=280))
    assert slow == [
        "SGD 0.03, seed 0: expected mip at 0.5 by step 260, got it by step 280",
        "Adam 2e-3, seed 0: expected an accuracy of 0.85 for mip, got 0.84",
    ]
    assert mip.failures(_results(mip, default, {"sgd": (0.9, 0.3), "adam": (0.9, 0.3)}, data="digits", by=260)) == []


def test_the_check_without_the_variants_it_compares_says_so(mip):
    results = importlib.import_module("common").Results(
        Path("none.json"), {"data": "digits", "sizes": {"trained": 0.5}}, ""
    )
    assert mip.failures(results) == ["check: expected the variants default and mip with SGD 0.03; run them first"]


def test_photographs_have_a_file_of_their_own(mip, tmp_path):
    from PIL import Image

    for split, kind in product(("train", "test"), ("cat", "dog")):
        (tmp_path / "two-pets" / split / kind).mkdir(parents=True)
        Image.effect_noise((12, 10), 50).convert("RGB").save(tmp_path / "two-pets" / split / kind / "0.png")
    folder = str(tmp_path / "two-pets")
    arguments = ["--dry-run", "--workers", "1", "--seeds", "0", "--variants", "mip", "--out", str(tmp_path)]
    mip.main([*arguments, "--data", folder])
    found = json.loads((tmp_path / "mip_convergence_two_pets.json").read_text())
    assert found["protocol"]["data"] == "two_pets" and len(found["rows"]) == len(mip.OPTIMIZERS)
    assert folder not in json.dumps(found)


def test_variants_are_set_beside_mip_seed_by_seed(mip):
    results = _empty("digits")
    for variant, losses in (("mip", (0.2, 0.4, None)), ("default", (0.5, 0.8, 0.9))):
        for seed, loss in enumerate(losses):
            of_run = {"variant": variant, "optimizer": "SGD 0.1", "seed": seed, "value": loss}
            results.rows.append({"claim": mip.CLAIM, "accuracy": 0.5, "steps_to_target": None, **of_run})
    # differences 0.3 and 0.4; t of one degree of freedom at 97.5 % is 12.706, so 0.35 +- 12.706 * 0.05
    assert "+0.350 (-0.285 to +0.985, n = 2)" in mip.report(results)
