"""Training with a scenario drawn for every sample: pretraining and fine-tuning alike.

Order of the data, scenarios, augmentation and dropout are functions of (seed, epoch, sample), and
the state after every epoch is on disk. So a killed run goes on at the epoch where it stopped, and
ends with the same bytes as one that was never killed (CPU, same number of threads).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm.auto import tqdm

from lsgs_core.errors import InputError
from lsgs_core.files import written_beside
from lsgs_core.lora import training_mode
from lsgs_core.losses import LossName, paper_loss, segmentation_loss
from lsgs_core.models.backbone import Backbone
from lsgs_core.patches import Batch, PatchDataset
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
        loss: "logits", or "paper" for the published loss (binary and multi-label only).
        augment: Turn and mirror every patch at random (the eight symmetries of the square).
    """

    epochs: int
    batch_size: int = 8
    learning_rate: float = 2e-3
    optimiser: Literal["adam", "sgd"] = "adam"
    weight_decay: float = 0.0
    rate_decay: float = 1.0
    rate_decay_every: int = 5
    loss: LossName = "logits"
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
        for name, known in (("optimiser", ("adam", "sgd")), ("loss", ("logits", "paper"))):
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
    whole = {"identity": dict(identity), "settings": asdict(settings), "seed": seed}
    state = _TrainingState(folder / STATE, json.dumps(whole, sort_keys=True))
    optimiser = _optimiser(model, settings)
    first, history = state.restore(model, optimiser, sampler)
    steps = -(-len(dataset) // settings.batch_size)
    bar = tqdm(
        total=settings.epochs * steps,
        initial=first * steps,
        unit="step",
        desc="training",
        disable=not progress,
    )
    with bar:
        for epoch in range(first, settings.epochs):
            row = _train_epoch(
                model, dataset, scenarios, sampler, optimiser, settings, seed, epoch, bar.update
            )
            if validate is not None:
                row |= validate(model)
            history.append(row)
            bar.set_postfix(loss=f"{row['loss']:.3f}")
            state.write(model, optimiser, sampler, history)
    return pd.DataFrame(history)


def _train_epoch(
    model: Backbone,
    dataset: PatchDataset,
    scenarios: ScenarioSet,
    sampler: ScenarioSampler,
    optimiser: torch.optim.Optimizer,
    settings: TrainingSettings,
    seed: int,
    epoch: int,
    done: Callable[[], object],
) -> dict[str, float]:
    rate = settings.learning_rate * settings.rate_decay ** (epoch // settings.rate_decay_every)
    for group in optimiser.param_groups:
        group["lr"] = rate
    device = next(model.parameters()).device
    # Dropout of an epoch does not depend on what ran before it, so a resumed run repeats it.
    torch.manual_seed(int(generator("dropout", seed, epoch).integers(2**63)))
    order = generator("order", seed, epoch).permutation(len(dataset))
    training_mode(model)
    losses: list[float] = []
    drawn: list[NDArray[np.int64]] = []
    for batch in dataset.batches(settings.batch_size, order):
        assert batch.patch_ids is not None
        ids = batch.patch_ids.numpy()
        chosen = draw_scenarios(
            sampler.probabilities(epoch), seed, epoch, ids, _servable(batch, scenarios)
        )
        if settings.augment:
            batch = turned(batch, uniform_numbers("augmentation", seed, epoch, ids))
        present = torch.from_numpy(scenarios.masks[chosen])
        loss, per_sample = _loss(model, batch.to(device), present.to(device), dataset, settings)
        if not torch.isfinite(loss):
            names = [scenarios.names[index] for index in chosen]
            raise FloatingPointError(
                f"training: the loss is {loss.item()} in epoch {epoch} for patches {ids.tolist()} "
                f"under scenarios {names}; try a lower learning rate"
            )
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        optimiser.step()
        sampler.observe(chosen, per_sample.cpu().double().numpy())
        losses.append(float(loss.detach()) * len(ids))
        drawn.append(chosen)
        done()
    shares = np.bincount(np.concatenate(drawn), minlength=len(scenarios)) / len(dataset)
    return {
        "epoch": epoch,
        "learning_rate": rate,
        "loss": sum(losses) / len(dataset),
        **{f"drawn:{name}": share for name, share in zip(scenarios.names, shares, strict=True)},
    }


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

    return Batch(
        images=tuple(turn(image) for image in batch.images),
        available=batch.available,
        target=None if batch.target is None else turn(batch.target),
        valid=None if batch.valid is None else turn(batch.valid),
        patch_ids=batch.patch_ids,
        block_ids=batch.block_ids,
    )


def _servable(batch: Batch, scenarios: ScenarioSet) -> NDArray[np.bool_] | None:
    """Scenarios whose modalities every patch has, bool [B, K]; None when all patches have all."""
    available = batch.available.numpy()
    if available.all():
        return None
    return ~(scenarios.masks[None] & ~available[:, None]).any(axis=2)


def _loss(
    model: Backbone,
    batch: Batch,
    present: Tensor,
    dataset: PatchDataset,
    settings: TrainingSettings,
) -> tuple[Tensor, Tensor]:
    assert batch.target is not None
    assert batch.valid is not None
    if settings.loss == "paper":
        if dataset.task_kind == "multiclass":
            raise InputError("loss: 'paper' is for binary and multi-label tasks")
        return paper_loss(model.heads(batch.images, present), batch.target, batch.valid)
    logits = model(batch.images, present)
    return segmentation_loss(logits, batch.target, batch.valid, dataset.task_kind)


def _optimiser(model: Backbone, settings: TrainingSettings) -> torch.optim.Optimizer:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if settings.optimiser == "sgd":
        return torch.optim.SGD(
            trained, settings.learning_rate, momentum=0.9, weight_decay=settings.weight_decay
        )
    return torch.optim.Adam(trained, settings.learning_rate, weight_decay=settings.weight_decay)


class _TrainingState:
    """What a run needs to go on: written beside and renamed after every epoch."""

    def __init__(self, path: Path, identity: str) -> None:
        self.path = path
        self.identity = identity
        path.parent.mkdir(parents=True, exist_ok=True)

    def restore(
        self, model: Backbone, optimiser: torch.optim.Optimizer, sampler: ScenarioSampler
    ) -> tuple[int, list[dict[str, float]]]:
        """Load the state if it is this run's; return the next epoch and the history so far."""
        if not self.path.is_file():
            return 0, []
        try:
            state = torch.load(self.path, map_location="cpu", weights_only=True)
        except Exception as error:  # a damaged pickle can raise anything
            raise InputError(
                f"{self.path}: not a training state; delete it to start anew: {error}"
            ) from error
        if state["identity"] != self.identity:
            tqdm.write(f"{self.path}: left by a run with other parameters; starting anew")
            return 0, []
        model.load_state_dict(state["model"])
        optimiser.load_state_dict(state["optimiser"])
        sampler.load_state_dict(json.loads(state["sampler"]))
        history = json.loads(state["history"])
        tqdm.write(f"{self.path}: going on after epoch {len(history) - 1}")
        return len(history), history

    def write(
        self,
        model: Backbone,
        optimiser: torch.optim.Optimizer,
        sampler: ScenarioSampler,
        history: list[dict[str, float]],
    ) -> None:
        """Keep the state after an epoch."""
        state = {
            "identity": self.identity,
            "model": model.state_dict(),
            "optimiser": optimiser.state_dict(),
            "sampler": json.dumps(sampler.state_dict()),
            "history": json.dumps(history),
        }
        with written_beside(self.path) as temporary:
            torch.save(state, temporary)
