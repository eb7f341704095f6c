"""The trainer: what it learns, that it repeats itself, and that a killed run loses nothing."""

import subprocess
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from study.provenance.devices import seed_weights
from study.training.loop import STATE, train, turned
from study.training.settings import TrainingSettings

from lsgs_core import Batch, InputError, ScenarioSet, build_backbone
from lsgs_core.adaptive import KernelGroupDRO, LossProportional
from lsgs_core.models.lora import add_lora, merge_lora, trained_parameters
from lsgs_core.sampling import FixedSampler

SCENARIOS = ScenarioSet.of(["A", "B", "C"])
SETTINGS = TrainingSettings(epochs=3, batch_size=4, learning_rate=2e-3)
UNIFORM = FixedSampler.uniform(7)
THIRDS = [1 / 3, 0, 0, 1 / 3, 0, 0, 1 / 3]


class Blobs:
    """Patches whose first bands show a bright square where the target is 1."""

    task_kind = "binary"

    def __init__(self, count: int = 10, size: int = 32) -> None:
        generator = torch.Generator().manual_seed(1)
        self.target = torch.zeros(count, 1, size, size)
        corners = torch.randint(4, 18, (count, 2), generator=generator)
        for index, (row, column) in enumerate(corners):
            self.target[index, 0, row : row + 10, column : column + 10] = 1
        noise = torch.randn(3, count, 3, size, size, generator=generator)
        self.images = noise * 0.3 + 2 * self.target[None]

    def __len__(self) -> int:
        return len(self.target)

    def batches(self, batch_size, order):
        starts = range(0, len(order), batch_size)
        yield from self.batches_of([order[start : start + batch_size] for start in starts])

    def batches_of(self, parts):
        for part in parts:
            chosen = torch.as_tensor(part)
            yield Batch(
                images=tuple(self.images[:, chosen]),
                available=torch.ones(len(chosen), 3, dtype=torch.bool),
                target=self.target[chosen],
                valid=torch.ones(len(chosen), *self.target.shape[2:], dtype=torch.bool),
                patch_ids=chosen,
                block_ids=chosen,
            )


def small(name: str = "cmx"):
    seed_weights(0, "finetuning")
    return build_backbone(name, preset="demo", bands=(3, 3, 3), classes=1)


def run(folder: Path, model=None, settings=SETTINGS, patches=None, **changes):
    model = model or small()
    arguments = {"sampler": UNIFORM, "seed": 0, "identity": {"data": "blobs"}, **changes}
    patches = patches or Blobs()
    return model, train(model, patches, SCENARIOS, settings=settings, folder=folder, **arguments)


def same(first, second) -> bool:
    pairs = zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    return all(torch.equal(one, other) for one, other in pairs)


@pytest.mark.parametrize("name", ["cbc_slp", "cbc", "cmx"])
def test_it_learns(tmp_path, name):
    _, history = run(tmp_path, small(name), replace(SETTINGS, epochs=12))
    assert history["loss"].iloc[-1] < 0.6 * history["loss"].iloc[0]
    assert history["epoch"].tolist() == list(range(12))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Uninterrupted runs by backbone, with their histories."""

    @cache
    def trained(name):
        sampler = LossProportional(THIRDS, 0.5, 1)
        return run(tmp_path_factory.mktemp("whole"), small(name), sampler=sampler)

    return trained


@pytest.mark.parametrize(
    ("name", "at", "save_every"),
    [
        *(("cmx", 1, 60.0), ("cmx", 4, 60.0), ("cmx", 5, 60.0), ("cmx", 8, 60.0)),
        *(("cmx", 1, 0.0), ("cmx", 4, 0.0), ("cmx", 8, 0.0), ("cbc_slp", 5, 0.0)),
    ],
)
def test_a_stopped_run_ends_with_the_same_bytes(
    tmp_path, monkeypatch, capsys, whole, name, at, save_every
):
    """Steps 1 to 3 are epoch 0: stopped before any state, at its end, and later.

    With a state after every epoch alone, and with one after every step.
    """
    monkeypatch.setattr("study.training.loop.SAVE_EVERY", save_every)
    steps = 0

    class Stopping(LossProportional):
        def observe(self, scenario, loss):
            nonlocal steps
            steps += 1
            if steps == at:
                raise KeyboardInterrupt  # in the middle of an epoch
            super().observe(scenario, loss)

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut", small(name), sampler=Stopping(THIRDS, 0.5, 1))
    saved = at > (1 if save_every == 0 else 3)
    assert (tmp_path / "cut" / STATE).is_file() == saved
    torch.rand(3)  # what the generators were used for in between does not matter
    resumed, of_both = run(tmp_path / "cut", small(name), sampler=LossProportional(THIRDS, 0.5, 1))
    assert ("going on in epoch" in capsys.readouterr().out) == saved
    model, history = whole(name)
    assert same(model, resumed)
    assert history.equals(of_both)


def test_a_full_disk_is_said_and_leaves_the_last_state(tmp_path, disk):
    size = sum(value.numel() * 4 for value in small().state_dict().values())  # and twice for Adam
    small_disk = disk(int(4.5 * size))  # room for one training state, not for two
    with pytest.raises(OSError, match=r"the disk is full; training_state\.pt was not written"):
        run(small_disk)
    assert [path.name for path in small_disk.iterdir()] == [STATE]  # nothing half-written
    subprocess.run(["mount", "-o", "remount,size=64m", str(small_disk)], check=True)
    resumed, history = run(small_disk)
    whole, _ = run(tmp_path / "whole")
    assert same(whole, resumed)
    assert len(history) == SETTINGS.epochs


@pytest.mark.parametrize("change", [{"seed": 1}, {"identity": {"data": "others"}}, {}])
def test_the_state_of_another_run_or_code_is_discarded(tmp_path, capsys, monkeypatch, change):
    run(tmp_path)
    if not change:
        monkeypatch.setattr("study.training.loop.fingerprint", lambda stage: "edited")
    fresh, _ = run(tmp_path / "elsewhere", **change)
    again, history = run(tmp_path, **change)
    assert "starting anew" in capsys.readouterr().out
    assert same(fresh, again)
    assert len(history) == SETTINGS.epochs


def test_a_damaged_state_is_said(tmp_path):
    (tmp_path / "training_state.pt").write_bytes(b"half a file")
    with pytest.raises(InputError, match=r"training_state\.pt"):
        run(tmp_path)


def test_a_loss_that_is_not_finite_names_patches_and_scenarios(tmp_path):
    model = small()
    with torch.no_grad():
        next(model.parameters()).fill_(float("nan"))
    with pytest.raises(FloatingPointError, match=r"patches \[.*\] under scenarios \['"):
        run(tmp_path, model)


def test_history_says_what_was_drawn_and_how_fast_it_learned(tmp_path):
    sampler = FixedSampler([0, 0, 0, 0, 0, 0, 1.0])
    settings = replace(SETTINGS, epochs=4, rate_decay=0.5, rate_decay_every=2)
    _, history = run(tmp_path, None, settings, sampler=sampler, validate=lambda _: {"score": 0.5})
    assert history["learning_rate"].tolist() == [2e-3, 2e-3, 1e-3, 1e-3]
    assert (history["drawn:A+B+C"] == 1).all()
    assert (history["drawn:A"] == 0).all()
    assert (history["score"] == 0.5).all()


def test_history_says_what_the_sampler_reports(tmp_path):
    sampler = KernelGroupDRO(UNIFORM.probabilities(0), UNIFORM.probabilities(0), np.eye(7), 0.1)
    _, history = run(tmp_path, None, replace(SETTINGS, epochs=2), sampler=sampler)
    assert history["degrees_of_freedom"].between(0, 7).all()
    assert history["degrees_of_freedom"].iloc[1] == 7 / (1 + sampler.ridge)


def test_paper_loss_and_sgd_run(tmp_path):
    settings = replace(SETTINGS, protocol="paper", optimiser="sgd", epochs=1)
    _, history = run(tmp_path, small("cbc_slp"), settings)
    assert history["loss"].iloc[0] > np.log1p(np.exp(-1))
    _, strict = run(tmp_path / "strict", small("cbc_slp"), replace(settings, protocol="strict"))
    assert history["loss"].iloc[0] < strict["loss"].iloc[0] - 0.1  # which adds a Jaccard loss


def test_a_single_patch_left_over_joins_the_batch_before(tmp_path):
    """CMX shrinks 32 pixels to one, and batch normalisation needs more than one value."""
    _, history = run(tmp_path, patches=Blobs(9), settings=replace(SETTINGS, epochs=1))
    assert np.isfinite(history["loss"]).all()
    assert history.filter(like="drawn:").sum(axis=1)[0] == pytest.approx(1)
    expected = {(8, 4): [4, 4], (10, 4): [4, 4, 2], (9, 4): [4, 5], (1, 4): [1], (3, 1): [1] * 3}
    for (patches, size), sizes in expected.items():
        assert TrainingSettings(epochs=1, batch_size=size).batch_sizes(patches) == sizes


def test_symmetries_move_images_and_targets_alike():
    batch = next(Blobs(8).batches(8, np.arange(8)))
    moved = turned(batch, np.arange(8) / 8)
    bright = (moved.images[0].mean(dim=1, keepdim=True) > 1).float()
    assert (bright == moved.target).float().mean() > 0.97
    assert torch.equal(moved.target[0], batch.target[0])
    copies = turned(next(Blobs(8).batches(8, np.zeros(8, dtype=int))), np.arange(8) / 8)
    assert len({tuple(patch.flatten().tolist()) for patch in copies.images[0]}) == 8


@pytest.mark.parametrize("name", ["cbc_slp", "cbc", "cmx"])
def test_low_rank_updates(tmp_path, name):
    model, untouched = small(name), small(name)
    trained = add_lora(model, rank=4)
    assert trained == trained_parameters(model) < 0.35 * trained_parameters(untouched)
    with pytest.raises(InputError, match="low-rank"):
        add_lora(model)
    patches = Blobs(size=64)  # large enough for every layer to matter
    batch = next(patches.batches(4, np.arange(4)))
    model.eval(), untouched.eval()
    before = untouched(batch.images, batch.available)
    torch.testing.assert_close(model(batch.images, batch.available), before)  # it starts at zero
    frozen = {n: v.clone() for n, v in untouched.state_dict().items()}
    run(tmp_path, model, replace(SETTINGS, epochs=2), patches)
    model.eval()
    adapted = model(batch.images, batch.available)
    adapted_layers = {f"{layer}.weight" for layer in model.low_rank_layers()}
    merge_lora(model)
    torch.testing.assert_close(model(batch.images, batch.available), adapted)
    after = model.state_dict()
    assert set(after) == set(frozen)  # an ordinary backbone again
    changed = {n for n in frozen if not torch.equal(after[n], frozen[n])}
    assert changed == adapted_layers  # all else, running statistics included, stayed
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_every_epoch_trains_also_after_a_validation(tmp_path):
    model, modes = small(), []
    norm = next(m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d))
    norm.register_forward_hook(lambda *_: modes.append(norm.training))
    settings = replace(SETTINGS, epochs=2)
    run(tmp_path, model, settings, validate=lambda network: network.eval() and {})
    assert len(modes) >= 6
    assert all(modes)


def test_draws_depend_on_seed_stream_and_stage(tmp_path):
    settings = replace(SETTINGS, epochs=1)
    changes = {}, {}, {"seed": 1}, {"stream": "second_scenario"}, {"stage": "pretraining"}
    first, *others = (
        run(tmp_path / str(n), settings=settings, **change)[1].filter(like="drawn:")
        for n, change in enumerate(changes)
    )
    assert [first.equals(other) for other in others] == [True, False, False, False]
