"""The constants of the recipes, written down a second time as their papers' tables have them."""

from importlib.resources import files

import pytest
from omegaconf import DictConfig, OmegaConf, open_dict

from hasten import registry
from hasten.check import check
from hasten.run import compose

ALL = None
IPC = (1, 10, 50)
GROWING = {1: (0, 5, 10, 1000), 10: (0, 10, 20, 1000), 50: (0, 20, 40, 2000)}
"""Images a class -> first and last start at the beginning, last start at the end, iterations in between."""
EVERY, ALPHA = (50, 100, 200), (0, 0.25, 0.375)

# a row: steps, lr_img, lr_label, batch, max_loss, all at 1, 10 and 50 images a class
IMAGENET = {
    "nette": [(40, 40, 80), (1e4, 1e3, 1e3), (2, 2, 5), (ALL, 200, 128), (1.5, 1.5, 1.5)],
    "woof": [(40, 40, 40), (1e4, 1e3, 100), (3, 3, 5), (ALL, 250, 250), (2, 2, 1.5)],
    "meow": [(40, 40, 80), (1e4, 1e3, 100), (3, 2, 5), (ALL, 250, 128), (2, 2, 1.1)],
    "yellow": [(40, 40, 40), (1e4, 1e3, 100), (3, 3, 5), (ALL, 250, 200), (1.5, 2, 1.5)],
    "squawk": [(40, 40, 80), (1e4, 1e3, 100), (3, 3, 5), (ALL, 250, 128), (1.5, 2, 1.1)],
    "fruit": [(40, 40, 80), (1e4, 1e3, 100), (5, 5, 5), (ALL, 200, 128), (1.1, 1.1, 1.1)],
    "birds_easy": [(40, 40, 40), (1e4, 1e3, 100), (2, 3, 5), (ALL, 200, 200), (1.7, 2, 1)],
    "birds_hard": [(40, 40, 40), (1e4, 1e3, 100), (2, 3, 5), (ALL, 200, 200), (1.5, 2, 1)],
    "cars_easy": [(40, 40, 40), (1e4, 1e3, 100), (3, 3, 5), (ALL, 200, 200), (2, 2, 1)],
    "cars_hard": [(40, 40, 40), (1e4, 1e3, 100), (3, 3, 5), (ALL, 200, 200), (2, 2, 1.5)],
    "dogs_easy": [(40, 40, 40), (1e4, 1e3, 100), (2, 5, 5), (ALL, 250, 200), (2, 2, 1)],
    "dogs_hard": [(40, 40, 40), (1e4, 1e3, 100), (2, 2, 5), (ALL, 200, 200), (2.5, 2, 1)],
    "compdd": [(40, 40, 80), (1e4, 1e3, 1e3), (2, 2, 5), (ALL, 200, 128), (1.5, 1.5, 1.5)],
}
WINDOWS_AT_50 = {"yellow": 1000, "squawk": 1000, "birds_easy": 1000}
EVERIES = dict.fromkeys(
    ["meow", "squawk", "birds_easy", "birds_hard", "cars_easy", "cars_hard", "dogs_easy", "dogs_hard"], (50, 100, 100)
) | {"fruit": (100, 100, 100)}
ALPHAS = {"squawk": (0, 0.25, 0.5), "birds_hard": (0, 0.25, 0.25), "fruit": (0.375, 0.375, 0.375)}
LR_LR = {("woof", 10): 1e-6}
BETA = {("woof", 10): 2, ("woof", 50): 2}
LR = {("squawk", 50): 0.005}

# a row: steps, lr_img, lr_label, batch, window (with what it begins as and by when it has grown, or fixed)
DATM = {
    "cifar10": {
        1: (80, 100, 5, 10, (0, 4)),
        10: (80, 100, 2, 100, (0, 10, 20, 1000)),
        50: (80, 1000, 2, 500, (0, 20, 40, 2000)),
        500: (40, 50, 10, 1000, (40, 60)),
        1000: (100, 50, 10, 1000, (40, 60)),
    },
    "cifar100": {
        1: (40, 1000, 10, 1000, (0, 10, 20, 1000)),
        10: (80, 1000, 10, 1000, (0, 30, 50, 2000)),
        50: (80, 1000, 10, 1000, (20, 70)),
        100: (80, 50, 10, 1000, (30, 70)),
    },
    "tiny": {
        1: (40, 1e4, 10, 1000, (0, 15, 20, 2000)),
        10: (40, 100, 10, 500, (10, 50)),
        50: (20, 100, 10, 1000, (40, 70)),
    },
}
POLICY = {1: (0, 50), 10: (0.25, 100), 50: (0.375, 200), 100: (0.375, 200), 500: (0.375, 200), 1000: (0.25, 200)}
"""Images a class -> share that is dropped and age of the maps, where DATM's constants are used for EDF."""
EDF_TINY = {10: (0.5, 100), 50: (0.5, 100)}
PAD = {1: 0, 10: 0.5, 50: 0.25, 500: 0.5, 1000: 0.5}
PAD_RELEASED = {1: 0, 10: 0.5, 50: 0.5}


def recipe(name):
    """The constants of a file of the group, without composing anything: there are many."""
    return OmegaConf.load(files("hasten.configs") / "recipe" / f"{name}.yaml")


def window(constants):
    """As in the tables above."""
    segments = constants.datamodule
    if segments.initial_max_start is None:
        return segments.min_start, segments.max_start
    return segments.min_start, segments.initial_max_start, segments.max_start, segments.expansion


def leaves(node, *path):
    for key in node:
        if isinstance(node[key], DictConfig):
            yield from leaves(node[key], *path, key)
        else:
            yield ".".join([*path, key]), node[key]


@pytest.mark.parametrize(("name", "ipc"), [(name, ipc) for name in IMAGENET for ipc in IPC])
def test_a_recipe_for_imagenet_is_the_row_of_its_table(name, ipc):
    cfg, at = recipe(f"{name}_ipc{ipc}"), IPC.index(ipc)
    module, (steps, lr_img, lr_label, batch, max_loss) = cfg.module, (column[at] for column in IMAGENET[name])
    assert (module.syn_steps, module.lr_img, module.lr_label) == (steps, lr_img, lr_label)
    assert (module.batch_syn, module.max_loss) == (batch, max_loss)
    assert module.lr_lr == LR_LR.get((name, ipc), 1e-5)
    assert module.synthetic.ipc == ipc and module.synthetic.lr == LR.get((name, ipc), 0.01)
    assert module.mask == {"_target_": "hasten.nn.LossQuantileMask", "alpha": ALPHAS.get(name, ALPHA)[at]}
    assert module.guide.every == EVERIES.get(name, EVERY)[at] and module.guide.beta == BETA.get((name, ipc), 1)
    grows = (0, 20, 40, 1000) if name == "fruit" else (*GROWING[ipc][:3], WINDOWS_AT_50.get(name, GROWING[50][3]))
    assert window(cfg) == (grows if ipc == 50 or name == "fruit" else GROWING[ipc])
    assert cfg.datamodule.expert_epochs == 2 and "init" not in module


@pytest.mark.parametrize(("name", "ipc"), [(name, ipc) for name in DATM for ipc in DATM[name]])
def test_a_recipe_for_small_images_has_the_constants_of_datm_and_a_policy_for_mask_and_guide(name, ipc):
    cfg = recipe(f"{name}_ipc{ipc}")
    module, (steps, lr_img, lr_label, batch, starts) = cfg.module, DATM[name][ipc]
    assert (module.syn_steps, module.lr_img, module.lr_label, module.batch_syn) == (steps, lr_img, lr_label, batch)
    assert window(cfg) == starts
    assert module.lr_lr == (1e-7 if (name, ipc) == ("cifar10", 1) else 1e-4 if name == "tiny" else 1e-5)
    assert module.max_loss == (1.1 if (name, ipc) == ("cifar10", 1) else 1)
    assert cfg.datamodule.expert_epochs == (3 if (name, ipc) == ("cifar100", 1) else 2)
    init = {"init": {"_target_": "hasten.nn.dataset_distillation.initial.real"}}
    assert ({"init": module.init} if "init" in module else {}) == (init if (name, ipc) == ("cifar100", 50) else {})
    policy = EDF_TINY if name == "tiny" and ipc in EDF_TINY else POLICY
    assert (module.mask.alpha, module.guide.every, module.guide.beta) == (*policy[ipc], 1)
    assert (module.synthetic.ipc, module.synthetic.lr) == (ipc, 0.01)


@pytest.mark.parametrize("ipc", PAD)
def test_a_recipe_of_pad_is_that_of_datm_with_its_share_of_the_network(ipc):
    pad, datm = recipe(f"pad_cifar10_ipc{ipc}"), recipe(f"cifar10_ipc{ipc}")
    assert pad.module.mask == {"_target_": "hasten.nn.DepthMask", "ratio": PAD[ipc], "by": "scalar"}
    assert {key for key in datm.module if datm.module[key] != pad.module.get(key)} == {"mask", "guide"}
    assert pad.datamodule == datm.datamodule


@pytest.mark.parametrize("ipc", PAD_RELEASED)
def test_a_recipe_of_pad_as_released_is_that_of_its_paper_with_another_mask(ipc):
    released, pad = recipe(f"pad_released_cifar10_ipc{ipc}"), recipe(f"pad_cifar10_ipc{ipc}")
    assert released.module.mask == {"_target_": "hasten.nn.LossQuantileMask", "alpha": PAD_RELEASED[ipc]}
    assert {key for key in pad.module if pad.module[key] != released.module[key]} == {"mask"}
    assert released.datamodule == pad.datamodule


def test_every_recipe_is_in_a_table():
    known = {f"{name}_ipc{ipc}" for name in IMAGENET for ipc in IPC}
    known |= {f"{name}_ipc{ipc}" for name in DATM for ipc in DATM[name]} | {f"pad_cifar10_ipc{ipc}" for ipc in PAD}
    known |= {f"pad_released_cifar10_ipc{ipc}" for ipc in PAD_RELEASED}
    assert set(registry.group("recipe")) == known | {"none"}


@pytest.mark.parametrize("ipc", [1, 10])
def test_constants_that_cannot_be_right_are_marked(ipc):
    assert "untrusted" in registry.group("recipe")[f"fruit_ipc{ipc}"]


@pytest.mark.parametrize(
    ("experiment", "words", "name"),
    [
        ("edf_imagenette", [], "nette_ipc10"),
        ("edf_imagenette", ["recipe=nette_ipc50"], "nette_ipc50"),
        ("edf_imagewoof", [], "woof_ipc10"),
        ("edf_imagemeow", [], "meow_ipc10"),
        ("edf_imagesquawk", [], "squawk_ipc10"),
        ("edf_imagefruit", [], "fruit_ipc10"),
        ("edf_imageyellow", [], "yellow_ipc10"),
        ("edf_compdd", [], "birds_hard_ipc10"),
        ("edf_compdd", ["data=compdd_snake_easy", "recipe=compdd_ipc1"], "compdd_ipc1"),
        ("edf_cifar10", ["recipe=cifar10_ipc1"], "cifar10_ipc1"),
        ("edf_cifar100", ["recipe=cifar100_ipc50"], "cifar100_ipc50"),
        ("edf_tiny", [], "tiny_ipc10"),
        ("pad_cifar10", ["recipe=pad_cifar10_ipc50"], "pad_cifar10_ipc50"),
        ("pad_released_cifar10", [], "pad_released_cifar10_ipc10"),
        ("pad_released_cifar10", ["recipe=pad_released_cifar10_ipc1"], "pad_released_cifar10_ipc1"),
    ],
)
def test_no_constant_of_a_recipe_is_hidden_by_its_experiment(experiment, words, name):
    cfg = compose([f"experiment={experiment}", "data.root=x", *words, "run_dir=x"])
    for key, value in leaves(recipe(name)):
        assert OmegaConf.select(cfg, key) == value, key
    assert cfg.trainer.max_steps == 10_000
    assert ("guide" in recipe(name).module) == (cfg.module.guide is not None)
    subset = cfg.data.get("subset")
    if subset is not None:
        assert subset in (f"image{name.partition('_ipc')[0]}", name.partition("_ipc")[0], "snake_easy")
        assert cfg.module.guide.layer == "layer4" and cfg.module.guide.classes.subset == subset
    with open_dict(cfg):
        cfg.stages = {stage: f"runs/stages/{stage}" for stage in cfg.first}
    check(cfg)


def test_datm_is_edf_without_mask_and_guide():
    edf, datm = (compose([f"experiment={name}_cifar10"]) for name in ("edf", "datm"))
    assert {key for key in edf.module if edf.module[key] != datm.module[key]} == {"mask", "guide"}
    assert (datm.module.mask, datm.module.guide) == (None, None)


def test_what_the_paper_of_pad_and_its_program_drop_is_a_mask_apart():
    paper, program = (compose([f"experiment={name}"]) for name in ("pad_cifar10", "pad_released_cifar10"))
    assert {key for key in paper.module if paper.module[key] != program.module[key]} == {"mask"}
    assert program.module.mask == {"_target_": "hasten.nn.LossQuantileMask", "alpha": 0.5}
    assert paper.first == program.first == ["experts_pad_cifar10"]


def test_a_recipe_given_to_pad_as_released_brings_its_mask_and_no_guide():
    cfg = compose(["experiment=pad_released_cifar10", "recipe=cifar10_ipc1"])
    assert cfg.module.mask.alpha == 0 and cfg.module.guide is None


DISTILLED = [
    name for name in registry.group("experiment") if name.startswith(("edf_", "datm_", "mtt_", "ftd_", "pad_"))
]
DISTILLED += [name for name in registry.group("experiment") if name.startswith(("tesla_", "dm_"))]
OTHERWISE = {"edf_compdd": {"subset"}, "dm_cifar10": {"zca", "mean", "std"}}
"""Where a word chooses the subset; and where experts that serve others too see the pixels of this run's authors."""


@pytest.mark.parametrize("name", DISTILLED)
def test_experts_trained_as_a_stage_are_those_of_their_own_experiment(name):
    cfg = compose([f"experiment={name}"])
    stages = [stage for stage in cfg.first if stage.startswith("experts_")]
    assert stages
    otherwise = {"subset"} if name.startswith("edf_image") else OTHERWISE.get(name, set())
    for stage in stages:
        own = compose([f"experiment={stage}"])
        # a stage takes the data of the run that asks for it
        keys = (set(cfg.data) | set(own.data)) - otherwise
        here, there = (OmegaConf.to_container(each.data, throw_on_missing=False) for each in (cfg, own))
        assert {key: here.get(key) for key in keys} == {key: there.get(key) for key in keys}
        assert cfg.model == own.model


@pytest.mark.parametrize("name", ["edf_mnist", "dm_digits"])
def test_a_set_is_judged_by_the_architecture_it_was_distilled_with(name):
    words = [f"experiment={name}", "model.norm=batch", "model.pad_to=256", "model.width=7", "model.depth=1"]
    cfg = compose(words)
    net = cfg.callbacks.evaluate_distilled.nets.convnet
    assert {key: net[key] for key in cfg.model} == cfg.model
