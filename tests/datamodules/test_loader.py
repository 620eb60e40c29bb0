import random
from collections import Counter
from itertools import chain, islice

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import multiprocessing

from hasten.datamodules import EpochLoader, loader
from hasten.errors import HastenError


class Drawing:
    """Samples that say their index and what they draw from each global generator."""

    def __len__(self):
        return 20

    def __getitem__(self, index):
        return index, random.random(), float(np.random.rand()), torch.rand(2)


class Whole:
    """Samples that come by whole batches only."""

    def __len__(self):
        return 10

    def batch(self, indices):
        return torch.tensor(indices), torch.tensor(indices) * 10


def plain(batches):
    return [[part.tolist() for part in batch] if isinstance(batch, tuple) else batch.tolist() for batch in batches]


def test_a_pass_shows_every_sample_once():
    batches = plain(EpochLoader(range(10), 4))
    assert [len(batch) for batch in batches] == [4, 4, 2]
    assert sorted(chain(*batches)) == list(range(10))
    assert len(EpochLoader(range(10), 4)) == 3


def test_without_shuffling_the_order_is_that_of_the_data():
    assert plain(EpochLoader(range(5), 2, shuffle=False)) == [[0, 1], [2, 3], [4]]


def test_drop_last_leaves_out_the_short_batch():
    dropping = EpochLoader(range(10), 4, drop_last=True)
    assert [len(batch) for batch in plain(dropping)] == [4, 4] and len(dropping) == 2


def test_a_subset_is_all_that_is_seen_and_counted():
    loader = EpochLoader(range(20), 2, subset=torch.tensor([3, 7, 11]))
    assert len(loader) == 2
    assert sorted(torch.cat(list(loader)).tolist()) == [3, 7, 11]
    assert loader.state_dict()["samples"] == 3


def test_the_order_is_a_function_of_seed_and_epoch():
    once, again, other = (EpochLoader(range(50), 50, seed=seed) for seed in (0, 0, 1))
    torch.manual_seed(1)
    first, second = plain(once), plain(once)
    torch.manual_seed(2)
    assert [plain(again), plain(again)] == [first, second]
    assert first != second
    assert plain(other) != first


def test_a_pass_left_early_is_followed_by_the_next_epoch():
    left, walked = EpochLoader(range(10), 4), EpochLoader(range(10), 4)
    next(iter(left))
    plain(walked)
    assert plain(left) == plain(walked)


def test_asking_for_an_iterator_begins_nothing():
    asked = EpochLoader(range(10), 4)
    iter(asked)
    assert plain(asked) == plain(EpochLoader(range(10), 4))


def test_batches_and_draws_do_not_depend_on_the_workers():
    epochs = {n: [plain(made), plain(made)] for n in (0, 2) for made in [EpochLoader(Drawing(), 8, num_workers=n)]}
    assert epochs[0] == epochs[2]


def test_a_sample_draws_by_seed_epoch_and_index_alone():
    def draws(batch_size, seed=0, shuffle=True):
        made = EpochLoader(Drawing(), batch_size, seed=seed, shuffle=shuffle)
        epochs = []
        for _ in range(2):
            batches = list(made)
            columns = [torch.cat([batch[column] for batch in batches]) for column in range(4)]
            index = columns[0].argsort()
            epochs.append([column[index].tolist() for column in columns[1:]])
        return epochs

    one = draws(4)
    assert draws(7, shuffle=False) == one
    assert all(a != b for a, b in zip(one[0], one[1], strict=True))
    assert all(a != b for a, b in zip(one[0], draws(4, seed=1)[0], strict=True))
    assert len(set(one[0][0])) == 20


@pytest.mark.parametrize("dataset", [Drawing(), Whole()])
def test_the_global_generators_are_left_as_they_were(dataset):
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    for _ in EpochLoader(dataset, 3):
        assert (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()) == states


def test_a_failing_sample_leaves_the_global_generators_as_they_were():
    class Broken(Drawing):
        def __getitem__(self, index):
            raise KeyError(index)

    state = torch.get_rng_state()
    with pytest.raises(KeyError):
        next(iter(EpochLoader(Broken(), 3)))
    assert torch.equal(torch.get_rng_state(), state)


def test_a_dataset_with_batch_is_asked_for_whole_batches():
    batches = list(EpochLoader(Whole(), 4, shuffle=False))
    assert all(isinstance(batch, tuple) for batch in batches)
    assert plain(batches)[2] == [[8, 9], [80, 90]]


def test_collated_samples_come_as_a_tuple():
    index, *_, pair = next(iter(EpochLoader(Drawing(), 3, shuffle=False)))
    assert index.tolist() == [0, 1, 2] and pair.shape == (3, 2)
    assert isinstance(next(iter(EpochLoader(Drawing(), 3))), tuple)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_hasten_error_in_a_sample_arrives_as_it_is(workers):
    class Unreadable(Drawing):
        def __getitem__(self, index):
            raise HastenError(f"cannot read image {index}")

    with pytest.raises(HastenError, match=r"^cannot read image 0$"):
        next(iter(EpochLoader(Unreadable(), 3, shuffle=False, num_workers=workers)))


# ------------------------------------------------------------------ resuming


@pytest.mark.parametrize("workers", [0, 2])
def test_a_restored_loader_goes_on_with_the_next_batch(workers):
    whole = EpochLoader(Drawing(), 8)
    expected = plain(whole) + plain(whole) + plain(whole)
    for done in range(7) if workers == 0 else (1, 3):
        interrupted = EpochLoader(Drawing(), 8, num_workers=workers)
        walk = (batch for _ in range(3) for batch in interrupted)
        assert plain(islice(walk, done)) == expected[:done]
        restored = EpochLoader(Drawing(), 8, num_workers=workers)
        restored.load_state_dict(interrupted.state_dict())
        assert (restored.epoch, restored.position) == divmod(done, 3)
        assert plain(batch for _ in range(restored.epoch, 3) for batch in restored) == expected[done:]


def test_the_state_is_plain_ints():
    state = EpochLoader(range(10), 4, seed=7).state_dict()
    assert state == {"epoch": 0, "position": 0, "seed": 7, "samples": 10, "samples_per_step": 4}
    assert {type(value) for value in state.values()} == {int}


def test_workers_that_loaded_ahead_do_not_move_the_position():
    ahead = EpochLoader(range(40), 4, num_workers=2)
    next(iter(ahead))
    assert ahead.state_dict()["position"] == 1


@pytest.mark.parametrize(
    ("change", "named"),
    [({"seed": 1}, "seed"), ({"batch_size": 5}, "samples per step"), ({"dataset": range(11)}, "samples")],
)
def test_a_position_that_means_other_batches_is_refused(change, named):
    one = EpochLoader(range(10), 4)
    next(iter(one))
    other = EpochLoader(**{"dataset": range(10), "batch_size": 4} | change)
    with pytest.raises(HastenError, match=f"^loader: {named}: expected"):
        other.load_state_dict(one.state_dict())
    plain(one)
    other.load_state_dict(one.state_dict())
    assert (other.epoch, other.position) == (2, 0)


def test_an_epoch_ends_where_it_is_told_to():
    short = EpochLoader(range(10), 2, steps_per_epoch=lambda: 3)
    long = EpochLoader(range(10), 2)
    first, second = plain(long), plain(long)
    batches = iter(short)
    assert plain(islice(batches, 3)) == first[:3]
    restored = EpochLoader(range(10), 2, steps_per_epoch=lambda: 3)
    restored.load_state_dict(short.state_dict())
    assert plain(batches) == []
    assert plain(restored) == second[:3]


def test_two_passes_at_once_are_refused():
    shared = EpochLoader(range(10), 4)
    older = iter(shared)
    next(older)
    next(iter(shared))
    with pytest.raises(RuntimeError, match="one pass at a time"):
        next(older)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 0}, "loader: batch_size: expected >= 1, got 0"),
        ({"batch_size": 4, "num_workers": -1}, "loader: num_workers: expected >= 0, got -1"),
    ],
)
def test_impossible_arguments_are_refused(arguments, message):
    with pytest.raises(HastenError, match=message):
        EpochLoader(range(10), **arguments)


def test_a_set_without_a_full_batch_is_refused():
    with pytest.raises(HastenError, match="at least 64 samples for a batch in each process, got 10"):
        len(EpochLoader(range(10), 64, drop_last=True))


# ------------------------------------------------------------------ processes


def shares(monkeypatch, samples, batch_size, world_size, **options):
    """What each of ``world_size`` processes sees of one epoch."""
    made = []
    for rank in range(world_size):
        monkeypatch.setattr(loader, "_rank_and_world_size", lambda rank=rank: (rank, world_size))
        mine = EpochLoader(range(samples), batch_size, **options)
        made.append(plain(mine))
        assert len(made[-1]) == len(mine)
    monkeypatch.undo()
    return made


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("batch_size", [1, 2, 4])
@pytest.mark.parametrize("samples", [3, 7, 8, 9, 12, 13, 25])
def test_processes_share_the_samples_and_keep_step(monkeypatch, samples, batch_size, world_size):
    processes = shares(monkeypatch, samples, batch_size, world_size)
    seen = Counter(sample for batches in processes for batch in batches for sample in batch)
    assert seen == Counter(range(samples))
    assert len({len(batches) for batches in processes}) == 1
    assert all(batch for batches in processes for batch in batches)
    sizes = [[len(batch) for batch in batches] for batches in processes]
    assert all(abs(a - b) <= 1 for step in zip(*sizes, strict=True) for a in step for b in step)


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_with_drop_last_all_batches_are_full(monkeypatch, world_size):
    processes = shares(monkeypatch, 25, 4, world_size, drop_last=True)
    assert {len(batch) for batches in processes for batch in batches} == {4}
    assert {len(batches) for batches in processes} == {25 // (4 * world_size)}


def test_batches_of_two_processes_are_those_of_one_twice_as_large(monkeypatch):
    two = shares(monkeypatch, 26, 4, 2)
    joined = plain(EpochLoader(range(26), 8))
    assert [sorted(a + b) for a, b in zip(*two, strict=True)] == [sorted(batch) for batch in joined]


def test_a_set_smaller_than_the_number_of_processes_is_refused(monkeypatch):
    with pytest.raises(HastenError, match="at least 3 samples for a batch in each process, got 2"):
        shares(monkeypatch, 2, 4, 3)


def _process():
    made = EpochLoader(range(11), 2)
    return [plain(made), plain(made)], len(made), made.state_dict()


def test_two_gloo_processes_find_their_own_shares(two_processes, monkeypatch):
    (first, second), lengths, states = zip(*two_processes(_process), strict=True)
    assert [first[0], second[0]] == shares(monkeypatch, 11, 2, 2)
    assert sorted(chain(*first[1], *second[1])) == list(range(11))
    assert lengths == (3, 3)
    assert states[0] == states[1] and states[0]["samples_per_step"] == 4


# ------------------------------------------------------------------ Lightning


class Watching(LightningModule):
    """Notes the batches it is trained on."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)
        self.seen = []

    def training_step(self, batch):
        self.seen.append(batch[0].tolist())
        return self.layer(batch[3].float()[:, :1]).mean()

    def validation_step(self, batch):
        pass

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Save(Callback):
    """Writes one checkpoint, in ``hook`` after so many steps."""

    def __init__(self, path, hook, steps):
        def save(trainer, *_):
            if trainer.global_step == steps and not path.exists():
                trainer.save_checkpoint(path)

        setattr(self, hook, save)


def fit(*, workers=0, limit=None, validate=False, callbacks=(), ckpt_path=None, train=None, **duration):
    module = Watching()
    trainer = Trainer(
        accelerator="cpu",
        logger=False,
        callbacks=list(callbacks),
        limit_train_batches=limit,
        limit_val_batches=None if validate else 0,
        num_sanity_val_steps=0,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **duration,
    )
    if train is None:
        train = EpochLoader(Drawing(), 4, num_workers=workers, steps_per_epoch=lambda: trainer.num_training_batches)
    trainer.fit(module, train, EpochLoader(Drawing(), 4, shuffle=False), ckpt_path=ckpt_path, weights_only=True)
    return module.seen


@pytest.mark.parametrize(
    ("hook", "validate", "saved"),
    [
        ("on_train_batch_end", False, range(1, 10)),
        ("on_train_batch_end", True, range(1, 10)),
        ("on_train_epoch_end", False, (3, 6)),
        ("on_train_epoch_end", True, (3, 6)),
        ("on_validation_end", True, (3, 6)),
    ],
)
@pytest.mark.parametrize("duration", [{"max_epochs": 3}, {"max_steps": 9}])
def test_lightning_resumes_with_the_batches_of_the_uninterrupted_run(tmp_path, duration, hook, validate, saved):
    options = {"limit": 3, "validate": validate, **duration}
    expected = fit(**options)
    for steps in saved:
        path = tmp_path / f"{steps}.ckpt"
        fit(**options, callbacks=[Save(path, hook, steps)])
        assert fit(**options, ckpt_path=path) == expected[steps:]


@pytest.mark.parametrize("steps", [2, 5, 7, 10])
def test_a_longer_run_goes_on_with_the_batches_of_one_that_was_long_at_once(tmp_path, steps):
    expected = fit(max_steps=12)
    assert len(expected) == 12 and expected[0] != expected[5]
    path = tmp_path / "last.ckpt"
    assert fit(max_steps=steps, callbacks=[Save(path, "on_train_end", steps)]) == expected[:steps]
    assert fit(max_steps=12, ckpt_path=path) == expected[steps:]


@pytest.mark.parametrize("steps", [2, 5])
def test_lightning_resumes_with_workers(tmp_path, steps):
    options = {"max_epochs": 2, "validate": True}
    path = tmp_path / "last.ckpt"
    expected = fit(**options)
    assert fit(**options, workers=2, callbacks=[Save(path, "on_train_batch_end", steps)]) == expected
    assert fit(**options, workers=2, ckpt_path=path) == expected[steps:]


def test_a_used_loader_begins_a_new_fit_where_lightning_does(tmp_path):
    expected, path = fit(max_epochs=3), tmp_path / "last.ckpt"
    used = EpochLoader(Drawing(), 4)
    next(iter(used))
    assert fit(max_epochs=3, train=used, callbacks=[Save(path, "on_train_epoch_end", 5)]) == expected
    assert fit(max_epochs=3, train=used, ckpt_path=path) == expected[5:]


def test_lightning_ends_the_workers_with_the_fit_and_a_new_pass_has_new_ones():
    used = EpochLoader(Drawing(), 4, num_workers=1)
    before = set(multiprocessing.active_children())
    fit(max_epochs=1, train=used)
    assert set(multiprocessing.active_children()) == before
    assert len(plain(used)) == 5
    used._iterator = None  # the trainer's cycles hold the loader: freed with them, its new workers would take seconds
