"""One fine-tuning run: from pretrained weights and a scoring to records, with any method."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

from lsgs_core.distortion import score_scenarios
from lsgs_core.methods import Evidence, find_method
from lsgs_core.models import Backbone
from lsgs_core.models.lora import add_lora, merge_lora, trained_parameters
from study.artifacts import Record, is_made, load_table, save_table, save_weights
from study.data.patches import PatchDataset
from study.devices import seed_weights
from study.evaluation import evaluate, validation_scores
from study.freshness import fingerprint
from study.model_card import CARD, save_model_card
from study.settings import TrainingSettings
from study.training import discard_state, train


@dataclass(frozen=True)
class Start:
    """What the runs of one backbone, fold and seed have in common: all but the method."""

    build: Callable[[], Backbone]  # the pretrained network, anew for every run
    evidence: Evidence  # what its scoring says
    training: PatchDataset
    validation: PatchDataset  # for the learning curve
    test: PatchDataset  # that no training saw
    settings: TrainingSettings
    seed: int  # of order, scenarios, augmentation, dropout, and what a method draws
    lora_learning_rate: float  # low-rank updates start at zero and need larger steps
    lora_rank: int
    parameters: Mapping[str, Any]  # what else decides the result
    inputs: Mapping[str, str]  # hashes of weights and probabilities


@dataclass(frozen=True)
class Run:
    """The results of a run."""

    method: str
    history: pd.DataFrame  # of `train`
    records: pd.DataFrame  # of `evaluate` on the test patches
    probabilities: NDArray[np.float64]  # p before the first step, [K]
    trained_parameters: int  # their number


def finetune(start: Start, name: str, folder: Path, keep_weights: bool = True) -> Run:
    """Fine-tune with one method, test, and write history, weights, records and a model card.

    A run that is there already, made by the same code with the same parameters from the same
    inputs, is read instead; one that was interrupted goes on. Low-rank updates are merged into the
    weights, if they are kept. Raises `InputError` where a method needs what the scoring lacks.
    """
    method = find_method(name)
    model, settings = start.build(), start.settings
    if method.low_rank:
        seed_weights(start.seed, "finetuning")
        add_lora(model, start.lora_rank)
        settings = replace(settings, learning_rate=start.lora_learning_rate)
    settings = replace(settings, learning_rate=settings.learning_rate * method.rate)
    device = str(next(model.parameters()).device)
    steps = settings.epochs * len(settings.batch_sizes(len(start.training)))
    evidence = replace(start.evidence, seed=start.seed, epochs=settings.epochs, steps=steps)
    sampler = method.sampler(replace(evidence, measure=partial(_scored_again, start, model)))
    p, trained = sampler.probabilities(0), trained_parameters(model)
    decisive = {**start.parameters, "method": name, "seed": start.seed}
    decisive |= {"settings": asdict(settings)}
    decisive |= {"lora_rank": start.lora_rank if method.low_rank else 0}
    record = Record(decisive, {**start.inputs, "code": fingerprint("finetuning")}, device)
    paths = [folder / "history.csv", folder / "records.csv"]
    if keep_weights:
        paths += [folder / "weights.safetensors", folder / CARD]
    if all(is_made(path, record) for path in paths):
        discard_state(folder)  # where a kill came between the last result and this
        return Run(name, load_table(paths[0]), load_table(paths[1]), p, trained)
    tested = start.evidence.scenarios, start.training.classes, start.training.task_kind
    size = settings.batch_size
    identity = {**decisive, **record.inputs, "device": device}
    history = train(
        model, start.training, start.evidence.scenarios, sampler, settings, start.seed, folder,
        identity, lambda net: validation_scores(net, start.validation.batches(size), *tested),
        method.stream,
    )  # fmt: skip
    merge_lora(model)
    records = evaluate(model, start.test.batches(size), *tested, protocol=settings.protocol)
    save_table(paths[0], history, record)
    if keep_weights:
        save_weights(paths[2], model.state_dict(), record)
        save_model_card(folder, start.training, history, records, record)
    save_table(paths[1], records, record)
    discard_state(folder)
    return Run(name, history, records, p, trained)


def finetune_each(
    start: Start, methods: Sequence[str], folder: Path, keep_weights: bool
) -> list[Run]:
    """Fine-tune with several methods, each in a folder of its name; see `finetune`."""
    return [finetune(start, name, folder / name, keep_weights) for name in methods]


def _scored_again(start: Start, model: torch.nn.Module) -> NDArray[np.float64]:
    """Score the network as it is now, in all scenarios, with the settings of the scoring."""
    batches = start.training.batches(start.settings.batch_size)
    scores = score_scenarios(model, batches, start.evidence.scenarios, progress=False)
    now = replace(start.evidence, distortion=scores.distortion, latent_shift=scores.latent_shift)
    return now.scored().probabilities(0)
