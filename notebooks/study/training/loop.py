"""Training with a scenario drawn for every sample: pretraining and fine-tuning alike.

Order of the data, scenarios and augmentation are functions of (seed, epoch, sample), and the state
of the run, that of the generator of dropout included, is on disk once a minute and after every
epoch. So a killed run goes on at the step where it was last saved, and ends with the same bytes as
one that was never killed (CPU, same number of threads).
"""

import json
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from tqdm.auto import tqdm

from lsgs_core.batch import Batch
from lsgs_core.dropout import ScenarioDropout
from lsgs_core.errors import InputError
from lsgs_core.models.backbone import Backbone
from lsgs_core.models.lora import training_mode
from lsgs_core.randomness import Stage, generator, uniform_numbers
from lsgs_core.sampling import ScenarioSampler
from lsgs_core.scenarios import ScenarioSet
from study.data.patches import PatchDataset
from study.metrics.losses import TaskKind, paper_loss, segmentation_loss
from study.provenance.devices import Processes, is_first_process
from study.provenance.files import make_folder, written_beside
from study.provenance.freshness import fingerprint
from study.training.settings import TrainingSettings

Validation = Callable[[Backbone], Mapping[str, float]]
STATE = "training_state.pt"
SAVE_EVERY = 60.0  # seconds between states within an epoch


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
    stage: Stage = "finetuning",
) -> pd.DataFrame:
    """Train a model in place, with its frozen parameters as they are.

    Args:
        model: A network on its device.
        dataset: Training patches.
        scenarios: The scenarios of the sampler's probabilities.
        sampler: Gives the probabilities, and sees the loss of every sample.
        settings: How to train.
        seed: Decides order, scenarios, augmentation and dropout.
        folder: Where the training state goes while the run lasts.
        identity: Everything else that the result depends on (data and initial weights). A training
            state with another identity, seed, settings or code is discarded.
        validate: Called after every epoch; its values become columns of the history.
        stream: One of `lsgs_core.randomness.STREAMS`, which scenarios are drawn with.
        stage: Decides the random numbers too, so that fine-tuning never replays pretraining.

    Returns:
        One row per epoch: epoch, learning_rate, loss, the share of samples drawn per scenario
        (columns `drawn:<scenario>`), what the sampler reports, and what `validate` gave.

    Raises `FloatingPointError` for a loss that is not finite, with patches and scenarios, and
    `InputError` where there is no patch, or the settings do not fit the data or the device.
    """
    device = next(model.parameters()).device
    # Equal steps gave other gradients of a 3×3×3 convolution, and NaN in one of twenty runs: the
    # backward pass of PyTorch 2.13 reads memory that was never written.
    if device.type == "cpu" and settings.precision == "bfloat16":
        raise InputError("precision: expected 'float32' on a CPU, found 'bfloat16', for GPUs alone")
    processes, sizes = Processes(device), settings.batch_sizes(len(dataset))
    if (last := min(sizes)) < processes.count:
        raise InputError(
            f"batch_size: {settings.batch_size} of {len(dataset)} patches leave a batch of {last} "
            f"for {processes.count} processes; expected at least a patch for each"
        )
    make_folder(folder)
    complete = {"identity": dict(identity), "settings": asdict(settings), "seed": seed}
    complete |= {"stream": stream, "stage": stage, "code": fingerprint(stage)}
    dropout = ScenarioDropout(scenarios, sampler, seed, stream, stage)
    text = json.dumps(complete, sort_keys=True)
    run = _Run(model, dataset, dropout, settings, processes, folder / STATE, text)
    run.restore()
    done, total = len(run.history) * len(sizes) + run.step, settings.epochs * len(sizes)
    bar = tqdm(initial=done, total=total, unit="step", desc="training", disable=processes.rank > 0)
    with bar:
        while len(run.history) < settings.epochs:
            row = run.epoch(bar)
            run.history.append({**row, **(validate(model) if validate else {})})
            run.step, run.loss, run.drawn = 0, 0.0, np.zeros(len(scenarios))
            run.keep()
    return pd.DataFrame(run.history)


def discard_state(folder: Path) -> None:
    """Delete the training state of a finished run, once its weights are saved."""
    if is_first_process():
        (folder / STATE).unlink(missing_ok=True)


def turned(batch: Batch, numbers: NDArray[np.float64]) -> Batch:
    """Apply one of the eight symmetries of the square to every patch, by numbers in [0, 1), [B]."""

    def turn(tensor: Tensor) -> Tensor:
        patches = []
        for patch, symmetry in zip(tensor, (numbers * 8).astype(int).tolist(), strict=True):
            patch = torch.rot90(patch, symmetry % 4, dims=(-2, -1))
            patches.append(patch.flip(-1) if symmetry >= 4 else patch)
        return torch.stack(patches)

    names = [name for name in ("target", "valid", "seen") if getattr(batch, name) is not None]
    others = {name: turn(getattr(batch, name)) for name in names}
    return replace(batch, images=tuple(turn(image) for image in batch.images), **others)


@dataclass
class _Run:
    """A training run, with what it needs to go on, and where it stands."""

    model: Backbone
    dataset: PatchDataset
    dropout: ScenarioDropout
    settings: TrainingSettings
    processes: Processes
    path: Path
    identity: str

    def __post_init__(self) -> None:
        settings = self.settings
        objective = _Objective(self.model, settings, self.dataset.task_kind)
        self.objective = self.processes.wrap(objective)
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        rate, decay = settings.learning_rate, settings.weight_decay
        self.optimiser: torch.optim.Optimizer = (
            torch.optim.SGD(trained, rate, momentum=0.9, weight_decay=decay)
            if settings.optimiser == "sgd"
            else torch.optim.Adam(trained, rate, weight_decay=decay, fused=True)
        )
        self.history: list[dict[str, float]] = []  # a row for every complete epoch
        self.step = 0  # steps of the next epoch that are done
        self.loss = 0.0  # sum of the losses of their samples
        self.drawn = np.zeros(len(self.dropout.scenarios))  # how often they drew each scenario, [K]
        self.random: list[Tensor] = []  # PyTorch's generators after them

    def restore(self) -> None:
        """Load the state if it is this run's."""
        if not self.path.is_file():
            return
        try:
            state = torch.load(self.path, map_location="cpu", weights_only=True)
            place = json.loads(state["place"])
        except Exception as error:  # a damaged file can make torch raise anything
            raise InputError(
                f"{self.path}: not a training state; delete it to start anew: {error}"
            ) from error
        if state["identity"] != self.identity:
            tqdm.write(f"{self.path}: left by a run with other parameters; starting anew")
            return
        self.model.load_state_dict(state["model"])
        self.optimiser.load_state_dict(state["optimiser"])
        self.dropout.load_state_dict(json.loads(state["sampler"]))
        self.history, self.step, self.loss = place["history"], place["step"], place["loss"]
        self.drawn = np.array(place["drawn"])
        if len(state["random"]) != self.processes.count and self.step:
            raise InputError(
                f"{self.path}: left by {len(state['random'])} processes within an epoch; go on "
                f"with as many, found {self.processes.count}, or delete it"
            )
        self.random = state["random"][self.processes.rank] if self.step else []
        tqdm.write(f"{self.path}: going on in epoch {len(self.history)}, step {self.step}")

    def keep(self) -> None:
        """Write the state, beside and renamed."""
        place = {"history": self.history, "step": self.step, "loss": self.loss}
        random = [torch.get_rng_state(), *torch.cuda.get_rng_state_all()]
        state = {
            "identity": self.identity,
            "model": self.model.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "sampler": json.dumps(self.dropout.state_dict()),
            "place": json.dumps({**place, "drawn": self.drawn.tolist()}),
            "random": self.processes.gather(random),
        }
        if self.processes.rank == 0:
            with written_beside(self.path) as temporary:
                torch.save(state, temporary)

    def epoch(self, bar: tqdm) -> dict[str, float]:
        """Train the rest of an epoch and return its row of the history."""
        settings, seed, stage = self.settings, self.dropout.seed, self.dropout.stage
        epoch = len(self.history)
        rate = settings.learning_rate * settings.rate_decay ** (epoch // settings.rate_decay_every)
        for group in self.optimiser.param_groups:
            group["lr"] = rate
        order = generator("order", seed, epoch, stage=stage).permutation(len(self.dataset))
        # A sampler may score the network first, in evaluation mode.
        self.dropout.sampler.probabilities(epoch)
        training_mode(self.model)
        if self.step:
            torch.set_rng_state(self.random[0])
            torch.cuda.set_rng_state_all(self.random[1:])
        else:
            # Dropout of an epoch does not depend on what ran before it.
            dropout = generator("dropout", seed, epoch, self.processes.rank, stage)
            torch.manual_seed(int(dropout.integers(2**63)))
        saved = time.monotonic()
        for batch in self._batches(order, self.step):
            loss, drawn = self._step(batch, epoch)
            self.step += 1
            self.loss += loss * len(drawn)
            np.add.at(self.drawn, drawn, 1)
            bar.set_postfix(epoch=epoch, loss=f"{loss:.3f}", refresh=False)
            bar.update()
            # One process decides, since all of them have to say where their generators stand.
            if self.processes.gather(time.monotonic() - saved >= SAVE_EVERY)[0]:
                self.keep()
                saved = time.monotonic()
        row = {"epoch": epoch, "learning_rate": rate, "loss": self.loss / len(self.dataset)}
        shares = (self.drawn / len(self.dataset)).tolist()
        names = (f"drawn:{name}" for name in self.dropout.scenarios.names)
        return row | dict(zip(names, shares, strict=True)) | self.dropout.sampler.report()

    def _batches(self, order: NDArray[np.int64], first: int) -> Iterator[list[Batch]]:
        """This process's share of every batch from the first on, in the parts of accumulation."""
        count, rank = self.processes.count, self.processes.rank
        ends = np.cumsum(self.settings.batch_sizes(len(order)))
        remaining = np.split(order, ends[:-1])[first:]
        # As many parts in every process, though shares may differ by a patch.
        numbers = [min(self.settings.accumulation, len(batch) // count) for batch in remaining]
        shares = [np.array_split(batch, count)[rank] for batch in remaining]
        parts = [np.array_split(s, number) for s, number in zip(shares, numbers, strict=True)]
        batches = self.dataset.batches_of([part for share in parts for part in share])
        for share in parts:
            yield [next(batches) for _ in share]

    def _step(self, parts: list[Batch], epoch: int) -> tuple[float, NDArray[np.int64]]:
        """One step of the optimiser; return the loss and the scenarios of the whole batch."""
        self.optimiser.zero_grad(set_to_none=True)
        seen, losses = [], []
        for number, batch in enumerate(parts):
            assert batch.patch_ids is not None
            ids, dropout = batch.patch_ids.numpy(), self.dropout
            chosen = dropout.draw(batch.patch_ids, epoch, batch.available)
            if self.settings.augment:
                numbers = uniform_numbers("augmentation", dropout.seed, epoch, ids, dropout.stage)
                batch = turned(batch, numbers)
            with self.processes.whole_gradients(self.objective, number == len(parts) - 1):
                loss, per_sample = self.objective(batch, dropout.scenarios.masks[chosen])
                if not torch.isfinite(loss):
                    names = [dropout.scenarios.names[index] for index in chosen]
                    raise FloatingPointError(
                        f"training: the loss is {loss.item()} in epoch {epoch} for patches "
                        f"{ids.tolist()} under scenarios {names}; try a lower learning rate"
                    )
                (loss / len(parts)).backward()
            losses.append(per_sample)
            seen.append((chosen, loss.item()))
        self.optimiser.step()
        self.dropout.observe(torch.cat(losses), np.concatenate([chosen for chosen, _ in seen]))
        everyone = [part for share in self.processes.gather(seen) for part in share]
        drawn = np.concatenate([chosen for chosen, _ in everyone])
        return float(np.mean([loss for _, loss in everyone])), drawn


class _Objective(nn.Module):
    """The network and its loss in one module, which is what several processes share."""

    def __init__(self, model: Backbone, settings: TrainingSettings, kind: TaskKind) -> None:
        super().__init__()
        self.model, self.kind = model, kind
        self.of_paper = settings.protocol == "paper"
        self.mixed = settings.precision == "bfloat16"

    def forward(self, batch: Batch, present: NDArray[np.bool_]) -> tuple[Tensor, Tensor]:
        """Loss of the batch, and per sample."""
        device = next(self.model.parameters()).device
        batch, available = batch.to(device), torch.from_numpy(present).to(device)
        assert batch.target is not None
        counted = batch.counted(available)
        with torch.autocast(device.type, torch.bfloat16, enabled=self.mixed):
            logits = (self.model.heads if self.of_paper else self.model)(batch.images, available)
        if logits.dtype == torch.bfloat16:  # too coarse for sums over millions of pixels
            logits = logits.float()
        if self.of_paper:
            return paper_loss(logits, batch.target, counted)
        return segmentation_loss(logits, batch.target, counted, self.kind)
