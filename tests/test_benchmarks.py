"""The benchmarks at tiny sizes: what they measure, what they write, and that they go on where they were stopped."""

import importlib
import json
from pathlib import Path

import pytest
import torch
from diffusers import DDPMScheduler
from PIL import Image
from torch import nn

from hasten.nn import MinSNRSampler, SpeeDSampler, UniformSampler

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
KEYS = {"claim", "arm", "seed", "value", "unit", "paper_value", "machine", "versions", "commit", "command"}


@pytest.fixture
def common(monkeypatch):  # scripts find each other by the folder they lie in
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module("common")


@pytest.fixture
def speed(common):
    return importlib.import_module("speed")


@pytest.fixture
def speed_gpu(speed, monkeypatch, tmp_path):
    module = importlib.import_module("speed_gpu")
    monkeypatch.setattr(module, "NETS", tmp_path / "nets")
    return module


class _Recording(DDPMScheduler):
    """Remembers the images and the noise of every training step."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def add_noise(self, original_samples, noise, timesteps):
        self.seen.append((original_samples, noise))
        return super().add_noise(original_samples, noise, timesteps)


class _Scale(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.zeros(()))

    def forward(self, x, t):
        return self.scale * x


def _denoiser(speed, sampler, *, flip=False):
    noise_scheduler = _Recording()
    images = torch.randint(0, 256, (50, 1, 4, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return speed.Denoiser(
        _Scale(), sampler(noise_scheduler), noise_scheduler, images, lr=0.1, batch=8, seed=3, flip=flip
    )


# ---------------------------------------------------------------------- what is measured


@pytest.mark.parametrize("flip", [False, True])
def test_arms_see_the_same_images_and_noise_whatever_their_samplers_draw(speed, flip):
    one, other = _denoiser(speed, UniformSampler, flip=flip), _denoiser(speed, SpeeDSampler, flip=flip)
    for _ in range(3):
        one.step()
        other.step()
    for (x, noise), (same_x, same_noise) in zip(one.noise_scheduler.seen, other.noise_scheduler.seen, strict=True):
        assert x.equal(same_x) and noise.equal(same_noise)
    assert not one.noise_scheduler.seen[0][1].equal(one.noise_scheduler.seen[1][1])


def test_arms_of_a_seed_begin_with_the_same_weights(speed, common):
    data = common.load_images("digits", 8)
    one, other, another = (
        speed.build(arm, s, data, speed.DRY_RUN) for arm, s in [("uniform", 0), ("p2", 0), ("p2", 1)]
    )
    assert all(a.equal(b) for a, b in zip(one.parameters, other.parameters, strict=True))
    assert not all(a.equal(b) for a, b in zip(one.parameters, another.parameters, strict=True))


def test_a_step_weighs_each_samples_error(speed):
    denoiser = _denoiser(speed, MinSNRSampler)
    drawn = []
    draw = denoiser.sampler.forward
    denoiser.sampler.forward = lambda n: drawn.append(draw(n)) or drawn[-1]
    denoiser.step()
    (x, noise), (t, weight) = denoiser.noise_scheduler.seen[0], drawn[0]
    # at scale 0 the gradient of w * mean((scale * noisy - noise)^2) is -2 w * mean(noisy * noise)
    noisy = DDPMScheduler().add_noise(x, noise, t)
    expected = sum(float(-2 * w * (a * b).mean()) for w, a, b in zip(weight, noisy, noise, strict=True)) / len(t)
    assert denoiser.model.scale.grad.item() == pytest.approx(expected, rel=1e-5)


def test_errors_are_those_of_the_average_which_leaves_the_weights_as_they_were(speed):
    denoiser = _denoiser(speed, UniformSampler)
    trail = []
    for _ in range(3):
        denoiser.step()
        trail.append(denoiser.model.scale.item())
    # the first update takes the weights, the n-th after it keeps (1 + n) / (10 + n) of the average
    average = 3 / 12 * (2 / 11 * trail[0] + 9 / 11 * trail[1]) + 9 / 12 * trail[2]
    x, noise = torch.rand(5, 1, 4, 4), torch.randn(len(speed.GRID), 5, 1, 4, 4)
    errors = denoiser.mse_by_timestep(x, noise)
    abar = DDPMScheduler().alphas_cumprod
    for i, t in enumerate(speed.GRID):
        noisy = abar[t].sqrt() * x + (1 - abar[t]).sqrt() * noise[i]
        assert errors[i] == pytest.approx((average * noisy - noise[i]).square().mean().item(), rel=1e-4)
    assert denoiser.model.scale.item() == trail[-1]
    assert denoiser.model.training


def test_the_distance_of_shifted_images_is_the_squared_shift(common):
    real = torch.rand(40, 1, 2, 2)
    distance = common.frechet_distance_to(real, nn.Flatten())
    assert distance(real) == pytest.approx(0, abs=1e-4)
    assert distance(real + 3) == pytest.approx(4 * 3**2, rel=1e-4)  # four features, equal covariances


def test_a_judge_measures_real_images_and_noise_and_refuses_distances_of_another_net(speed, common):
    grey = torch.randint(100, 150, (40, 1, 2, 2), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    data = common.Images("grey", grey, torch.zeros(40).long(), grey[:20], torch.zeros(20).long())
    judge = speed.Judge(data, nn.Flatten(), name="pixels", accuracy=0.5, held_out=4, n=10)
    real, noise = judge.bound_rows(seed=2)
    assert (real["claim"], real["n"], real["seed"]) == ("fd_grey_pixels", 10, 2)
    assert 0 < real["value"] < noise["value"]
    judge.check([real, {"claim": "val/mse"}])
    with pytest.raises(SystemExit, match="fd_grey_pixels: found results of another feature net"):
        judge.check([{**real, "net": "other"}])


@pytest.mark.parametrize(("n", "of_all"), [(10, False), (11, True), (100, True)])
def test_the_reference_is_held_out_where_there_is_enough_of_it(speed, common, n, of_all):
    train, held_out = torch.zeros(30, 1, 2, 2, dtype=torch.uint8), torch.ones(20, 1, 2, 2, dtype=torch.uint8)
    found, pool = speed.reference(common.Images("x", train, torch.zeros(30), held_out, torch.zeros(20)), n)
    assert found == min(n, 25)
    assert len(pool) == (50 if of_all else 20)


def test_a_folder_of_images_is_read_in_colour_at_the_size_asked_for(common, tmp_path):
    for split, count in (("train", 3), ("test", 1)):
        for value, name in enumerate(("cat", "dog")):
            (tmp_path / "my-set" / split / name).mkdir(parents=True)
            for i in range(count):
                Image.new("RGB", (32, 20), (100 * value, 0, 50)).save(tmp_path / "my-set" / split / name / f"{i}.png")
    data = common.load_images(str(tmp_path / "my-set"), 8)
    assert (data.name, data.num_classes, data.shape) == ("my_set", 2, (3, 8, 8))
    assert len(data.train) == 6 and len(data.held_out) == 2
    assert data.train[:, 0].flatten(1).float().mean(1).tolist() == [100.0 * label for label in data.train_labels]
    with pytest.raises(SystemExit, match="expected a folder with train/ and test/ or val/"):
        common.load_images(str(tmp_path), 8)


def test_zone_means_are_over_the_areas_of_the_schedule(speed):
    zones = speed.zone_means([float(t) for t in speed.GRID])
    assert zones["acceleration"] == sum([25, 75, 125, 175]) / 4
    assert zones["convergence"] == zones["t >= 700"] == sum(range(725, 1000, 50)) / 6
    assert zones["t <= 500"] == 250
    assert zones["all"] == 500


def test_a_curve_reaches_its_target_between_two_points(speed_gpu):
    curve = [(10, 4.0), (20, 2.0), (30, 1.0)]
    assert speed_gpu.first_reach(curve, 3.0) == 15
    assert speed_gpu.first_reach(curve, 5.0) == 10
    assert speed_gpu.first_reach(curve, 0.5) is None


# ---------------------------------------------------------------------- what is written


def test_an_interrupted_cpu_benchmark_goes_on_and_writes_rows_a_plot_and_a_table(speed, tmp_path, monkeypatch, capsys):
    arguments = ["--dry-run", "--seeds", "0", "--plain", "--out", str(tmp_path)]
    begun = _stop_once(speed, monkeypatch, at="uniform_plain")
    with pytest.raises(KeyboardInterrupt):
        speed.main(arguments)
    path = tmp_path / "speed_cpu_digits.json"
    kept = json.loads(path.read_text())["rows"]
    done = {row["arm"] for row in kept if "by_timestep" in row}
    begun.clear()
    speed.main(arguments)
    assert {arm for arm, _ in begun} == {"uniform", "speed", "uniform_plain", "speed_plain"} - done

    found = json.loads(path.read_text())
    assert all(row in found["rows"] for row in kept if row["arm"] in done)
    assert {row["arm"] for row in found["rows"] if "by_timestep" in row} == done | {arm for arm, _ in begun}
    assert all(row.keys() >= KEYS for row in found["rows"])
    assert {row["claim"] for row in found["rows"]} == {"val/mse", "fd_digits_convnet", speed.COST}
    assert str(tmp_path) not in json.dumps(found)
    assert path.with_suffix(".png").stat().st_size > 10_000
    assert "| speed | 0 |" in capsys.readouterr().out


def test_an_interrupted_gpu_benchmark_goes_on_with_as_many_steps(speed_gpu, tmp_path, monkeypatch, capsys):
    arguments = ["--dry-run", "--out", str(tmp_path), "--seed", "1"]
    arms = list(speed_gpu.SAMPLERS)
    begun = _stop_once(speed_gpu, monkeypatch, at=arms[-1])
    with torch.compiler.set_stance("force_eager"):  # tracing takes seconds
        with pytest.raises(KeyboardInterrupt):
            speed_gpu.main(arguments)
        speed_gpu.main(arguments)
    assert [arm for arm, _ in begun] == [*arms, arms[-1]]
    assert len({steps for _, steps in begun}) == 1

    found = json.loads((tmp_path / "speed_gpu_digits.json").read_text())
    assert all(row.keys() >= KEYS for row in found["rows"])
    assert {row["seed"] for row in found["rows"]} == {1}
    assert sum(row["claim"] == "val/mse" for row in found["rows"]) == len(arms) * speed_gpu.DRY_RUN.evaluations
    assert [row["arm"] for row in found["rows"] if row["claim"] == speed_gpu.REACH] == arms
    assert "| uniform | 1.00 |" in capsys.readouterr().out


def _stop_once(module, monkeypatch, *, at):
    """Stop a benchmark as Ctrl-C does when it comes to an arm the first time; (arm, steps) of all that were begun."""
    run_arm, begun, stops = module.run_arm, [], [at]

    def stopped(denoiser, judge, arm, *, steps, **options):
        begun.append((arm, steps))
        if arm in stops:
            stops.clear()
            raise KeyboardInterrupt
        return run_arm(denoiser, judge, arm, steps=steps, **options)

    monkeypatch.setattr(module, "run_arm", stopped)
    return begun


def test_results_of_another_protocol_are_neither_continued_nor_replaced(common, tmp_path):
    path = tmp_path / "x.json"
    common.Results(path, {"steps": 8}, "").add({"claim": "c", "arm": "a", "seed": 0, "value": 1.0, "unit": "u"})
    with pytest.raises(SystemExit, match=r"another protocol \(steps\); pass --fresh"):
        common.Results(path, {"steps": 9}, "")
    assert len(common.Results(path, {"steps": 8}, "").rows) == 1
    assert not common.Results(path, {"steps": 9}, "", fresh=True).rows


def test_a_row_measured_again_takes_the_place_of_the_old_one(common, tmp_path):
    results = common.Results(tmp_path / "x.json", {}, "")
    row = {"claim": "c", "arm": "a", "seed": 0, "unit": "u"}
    results.add({**row, "value": 1.0}, {**row, "seed": 1, "value": 2.0})
    results.add({**row, "value": 3.0})
    assert sorted(r["value"] for r in common.Results(tmp_path / "x.json", {}, "").rows) == [2.0, 3.0]


def test_a_command_names_folders_without_their_place(common):
    typed = common.command("/somewhere/benchmarks/speed.py", ["--data", "/home/me/cifar10", "--seeds", "0,1"])
    assert typed == "python benchmarks/speed.py --data cifar10 --seeds 0,1"


@pytest.mark.parametrize(
    ("low", "high", "cost", "said"),
    [
        (0.9, 1.1, 0.001, []),
        (1.1, 1.1, 0.001, ["signature: expected speed lower than uniform at t <= 500, got +10.0%"]),
        (0.9, 0.9, 0.001, ["signature: expected speed higher than uniform at t >= 700, got -10.0%"]),
        (0.9, 1.1, 0.02, ["cost: expected below 1% of a training step, got 2.00%"]),
    ],
)
def test_the_check_names_what_is_not_shown(speed, common, tmp_path, low, high, cost, said):
    results = common.Results(tmp_path / "x.json", {}, "")
    row = {"claim": "val/mse", "seed": 0, "value": 1.0, "unit": "MSE", "step": 8, "by_timestep": []}
    results.add(
        {**row, "arm": "uniform", "zones": {"t <= 500": 1.0, "t >= 700": 1.0}},
        {**row, "arm": "speed", "zones": {"t <= 500": low, "t >= 700": high}},
        {"claim": speed.COST, "arm": "speed", "seed": None, "value": cost, "unit": "ratio"},
    )
    assert speed.failures(results) == said


def test_the_check_without_the_arms_it_compares_says_so(speed, common, tmp_path):
    assert speed.failures(common.Results(tmp_path / "x.json", {}, "")) == [
        "check: expected the arms uniform and speed for one seed at least; run them first"
    ]


def test_the_gpu_benchmark_without_a_gpu_says_what_to_do(speed_gpu, monkeypatch):
    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(SystemExit, match="expected a GPU, found none; pass --dry-run"):
        speed_gpu.main([])


def test_unknown_arms_are_named(speed, capsys):
    with pytest.raises(SystemExit):
        speed.main(["--arms", "uniform,speedy"])
    assert "got speedy" in capsys.readouterr().err
