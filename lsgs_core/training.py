"""Training with a scenario drawn for every sample: pretraining and fine-tuning alike.

Order of the data, scenarios, augmentation and dropout are functions of (seed, epoch, sample), and
the state after every epoch is on disk. So a killed run goes on at the epoch where it stopped, and
ends with the same bytes as one that was never killed (CPU, same number of threads).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm.auto import tqdm

from lsgs_core.batch import Batch
from lsgs_core.errors import InputError
from lsgs_core.files import written_beside
from lsgs_core.lora import training_mode
from lsgs_core.losses import Protocol, paper_loss, segmentation_loss
from lsgs_core.models.backbone import Backbone
from lsgs_core.patches import PatchDataset
from lsgs_core.sampling import ScenarioSampler, draw_scenarios, generator, uniform_numbers
from lsgs_core.scenarios import ScenarioSet

Validation = Callable[[Backbone], Mapping[str, float]]
STATE = "training_state.pt"


@dataclass(frozen=True)
class TrainingSettings:
    """How to train. The paper's own values sit in a file that was not published; these are ours.

    Attributes:
        epochs: Passes over the training patches.
        batch_size: Patches per step.
        learning_rate: At the start.
        optimiser: "adam" or "sgd" (with momentum 0.9).
        weight_decay: L2 penalty.
        rate_decay: Factor on the learning rate ...
        rate_decay_every: ... every so many epochs.
        protocol: "strict" takes `segmentation_loss`, "paper" the published one (binary and
            multi-label tasks only).
        augment: Turn and mirror every patch at random (the eight symmetries of the square).
    """

    epochs: int
    batch_size: int = 8
    learning_rate: float = 2e-3
    optimiser: Literal["adam", "sgd"] = "adam"
    weight_decay: float = 0.0
    rate_decay: float = 1.0
    rate_decay_every: int = 5
    protocol: Protocol = "strict"
    augment: bool = True

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            InputError: Names the setting and what was expected.
        """
        for name, least in (("epochs", 0), ("batch_size", 1), ("rate_decay_every", 1)):
            if getattr(self, name) < least:
                raise InputError(f"{name}: expected {least} or more, found {getattr(self, name)}")
        if not self.learning_rate > 0 or not 0 < self.rate_decay <= 1 or self.weight_decay < 0:
            raise InputError(
                "learning_rate > 0, 0 < rate_decay <= 1 and weight_decay >= 0 expected, found "
                f"{self.learning_rate}, {self.rate_decay}, {self.weight_decay}"
            )
        for name, known in (("optimiser", ("adam", "sgd")), ("protocol", ("strict", "paper"))):
            if getattr(self, name) not in known:
                raise InputError(f"{name}: expected one of {known}, found {getattr(self, name)!r}")


def make_deterministic(threads: int) -> None:
    """Fix what PyTorch leaves open: the number of CPU threads and the choice of kernels.

    One and two threads differ after some steps, so the number is a parameter that is recorded.

    Raises:
        InputError: Fewer than one thread.
    """
    if threads < 1:
        raise InputError(f"threads: expected 1 or more, found {threads}")
    torch.set_num_threads(threads)
    # Only a warning, since some CUDA backward passes (3-D resizing) have no deterministic form.
    torch.use_deterministic_algorithms(True, warn_only=True)
    # It would also fill every new tensor with NaN first, to show who reads memory before writing.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def seed_weights(seed: int) -> None:
    """Seed PyTorch's generator before a network is built or adapted."""
    torch.manual_seed(int(generator("weights", seed).integers(2**63)))


def choose_device(name: str) -> torch.device:
    """The device of a name; "auto" is the GPU where there is one.

    Raises:
        InputError: The device is not known or not there.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"device: {name!r} cannot be used: {error}") from error
    return device


def train(
    model: Backbone,
    dataset: PatchDataset,
    scenarios: ScenarioSet,
    sampler: ScenarioSampler,
    settings: TrainingSettings,
    seed: int,
    folder: Path,
    identity: Mapping[str, Any],
    validate: Validation | None = None,
    stream: str = "scenario",
    progress: bool = True,
) -> pd.DataFrame:
    """Train a model in place.

    Args:
        model: On its device; frozen parameters stay as they are.
        dataset: Training patches.
        scenarios: What the sampler's probabilities are over.
        sampler: Gives the probabilities; sees the loss of every sample.
        settings: How to train.
        seed: Decides order, scenarios, augmentation and dropout.
        folder: Where the training state goes while the run lasts.
        identity: Everything else that the result depends on (data and initial weights); a training
            state that was left with another identity, seed or settings is not gone on with.
        validate: Called after every epoch; its figures become columns of the history.
        stream: Random numbers that scenarios are drawn with (`lsgs_core.sampling.STREAMS`).
        progress: Show a progress bar over the steps.

    Returns:
        One row per epoch: epoch, learning_rate, loss, the share of samples drawn per scenario
        (columns `drawn:<scenario>`), and what `validate` gave.

    Raises:
        FloatingPointError: The loss is not finite; names patches and scenarios.
        InputError: The data set is empty.
    """
    if not len(dataset):
        raise InputError("training: expected at least one training patch, found none")
    if settings.protocol == "paper" and dataset.task_kind == "multiclass":
        raise InputError("protocol: 'paper' is for binary and multi-label tasks")
    folder.mkdir(parents=True, exist_ok=True)
    whole = {"identity": dict(identity), "settings": asdict(settings), "seed": seed}
    whole["stream"] = stream
    run = _Run(
        model, dataset, scenarios, sampler, settings, seed, stream, _optimiser(model, settings),
        folder / STATE, json.dumps(whole, sort_keys=True),
    )  # fmt: skip
    history = run.restore()
    steps = -(-len(dataset) // settings.batch_size)
    done, total = len(history) * steps, settings.epochs * steps
    with tqdm(initial=done, total=total, unit="step", desc="training", disable=not progress) as bar:
        for epoch in range(len(history), settings.epochs):
            row = run.epoch(epoch, bar)
            if validate is not None:
                row |= validate(model)
            history.append(row)
            run.keep(history)
    return pd.DataFrame(history)


def discard_state(folder: Path) -> None:
    """Delete the training state of a finished run, once its weights are saved."""
    (folder / STATE).unlink(missing_ok=True)


def turned(batch: Batch, numbers: NDArray[np.float64]) -> Batch:
    """Apply one of the eight symmetries of the square to every patch, chosen by its number.

    Args:
        batch: Square patches.
        numbers: In [0, 1), [B].
    """

    def turn(tensor: Tensor) -> Tensor:
        patches = []
        for patch, symmetry in zip(tensor, (numbers * 8).astype(int).tolist(), strict=True):
            patch = torch.rot90(patch, symmetry % 4, dims=(-2, -1))
            patches.append(patch.flip(-1) if symmetry >= 4 else patch)
        return torch.stack(patches)

    return replace(
        batch,
        images=tuple(turn(image) for image in batch.images),
        target=None if batch.target is None else turn(batch.target),
        valid=None if batch.valid is None else turn(batch.valid),
        seen=None if batch.seen is None else turn(batch.seen),
    )


@dataclass(frozen=True)
class _Run:
    """A training run, with what it needs to go on: written and renamed after every epoch."""

    model: Backbone
    dataset: PatchDataset
    scenarios: ScenarioSet
    sampler: ScenarioSampler
    settings: TrainingSettings
    seed: int
    stream: str
    optimiser: torch.optim.Optimizer
    path: Path
    identity: str

    def restore(self) -> list[dict[str, float]]:
        """Load the state if it is this run's, and return the history so far."""
        if not self.path.is_file():
            return []
        try:
            state = torch.load(self.path, map_location="cpu", weights_only=True)
        except Exception as error:  # a damaged file can make torch raise anything
            raise InputError(
                f"{self.path}: not a training state; delete it to start anew: {error}"
            ) from error
        if state["identity"] != self.identity:
            tqdm.write(f"{self.path}: left by a run with other parameters; starting anew")
            return []
        self.model.load_state_dict(state["model"])
        self.optimiser.load_state_dict(state["optimiser"])
        self.sampler.load_state_dict(json.loads(state["sampler"]))
        history: list[dict[str, float]] = json.loads(state["history"])
        tqdm.write(f"{self.path}: going on after epoch {len(history) - 1}")
        return history

    def keep(self, history: list[dict[str, float]]) -> None:
        """Write the state after an epoch."""
        state = {
            "identity": self.identity,
            "model": self.model.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "sampler": json.dumps(self.sampler.state_dict()),
            "history": json.dumps(history),
        }
        with written_beside(self.path) as temporary:
            torch.save(state, temporary)

    def epoch(self, epoch: int, bar: tqdm) -> dict[str, float]:
        """Train one epoch and return its row of the history."""
        settings, seed = self.settings, self.seed
        rate = settings.learning_rate * settings.rate_decay ** (epoch // settings.rate_decay_every)
        for group in self.optimiser.param_groups:
            group["lr"] = rate
        # Dropout of an epoch does not depend on what ran before it, so a resumed run repeats it.
        torch.manual_seed(int(generator("dropout", seed, epoch).integers(2**63)))
        order = generator("order", seed, epoch).permutation(len(self.dataset))
        self.sampler.probabilities(epoch)  # a sampler may score the network first, in eval mode
        training_mode(self.model)
        total = 0.0
        drawn = np.zeros(len(self.scenarios))
        for batch in self.dataset.batches(settings.batch_size, order):
            assert batch.patch_ids is not None
            ids = batch.patch_ids.numpy()
            probabilities = self.sampler.probabilities(epoch)
            chosen = draw_scenarios(
                probabilities, seed, epoch, ids, self._servable(batch), self.stream
            )
            if settings.augment:
                batch = turned(batch, uniform_numbers("augmentation", seed, epoch, ids))
            loss, per_sample = self._loss(batch, self.scenarios.masks[chosen])
            if not torch.isfinite(loss):
                names = [self.scenarios.names[index] for index in chosen]
                raise FloatingPointError(
                    f"training: the loss is {loss.item()} in epoch {epoch} for patches "
                    f"{ids.tolist()} under scenarios {names}; try a lower learning rate"
                )
            self.optimiser.zero_grad(set_to_none=True)
            loss.backward()
            self.optimiser.step()
            self.sampler.observe(chosen, per_sample.cpu().double().numpy())
            total += loss.item() * len(ids)
            np.add.at(drawn, chosen, 1)
            bar.set_postfix(epoch=epoch, loss=f"{loss.item():.3f}", refresh=False)
            bar.update()
        shares = dict(zip(self.scenarios.names, (drawn / len(self.dataset)).tolist(), strict=True))
        return {
            "epoch": epoch,
            "learning_rate": rate,
            "loss": total / len(self.dataset),
            **{f"drawn:{name}": share for name, share in shares.items()},
        }

    def _servable(self, batch: Batch) -> NDArray[np.bool_] | None:
        """Scenarios whose modalities every patch has, bool [B, K]; None when all have all."""
        absent = ~batch.available.numpy()
        if not absent.any():
            return None
        return ~(self.scenarios.masks[None] & absent[:, None]).any(axis=2)

    def _loss(self, batch: Batch, present: NDArray[np.bool_]) -> tuple[Tensor, Tensor]:
        device = next(self.model.parameters()).device
        batch, available = batch.to(device), torch.from_numpy(present).to(device)
        assert batch.target is not None
        counted = batch.counted(available)
        if self.settings.protocol == "paper":
            return paper_loss(self.model.heads(batch.images, available), batch.target, counted)
        logits = self.model(batch.images, available)
        return segmentation_loss(logits, batch.target, counted, self.dataset.task_kind)


def _optimiser(model: Backbone, settings: TrainingSettings) -> torch.optim.Optimizer:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    rate, decay = settings.learning_rate, settings.weight_decay
    if settings.optimiser == "sgd":
        return torch.optim.SGD(trained, rate, momentum=0.9, weight_decay=decay)
    return torch.optim.Adam(trained, rate, weight_decay=decay, fused=True)
