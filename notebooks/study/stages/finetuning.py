"""One fine-tuning run: from pretrained weights and a scoring to records, with any method."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

from lsgs_core.distortion import score_scenarios
from lsgs_core.methods import Evidence, find_method
from lsgs_core.models.lora import add_lora, merge_lora, trained_parameters
from study.metrics.evaluation import evaluate, validation_scores
from study.provenance.artifacts import is_made, load_table, save_table, save_weights
from study.provenance.devices import seed_weights
from study.training.loop import discard_state, train
from study.training.model_card import CARD, save_model_card

if TYPE_CHECKING:
    from study.stages.run import NetworkRun


@dataclass(frozen=True)
class Run:
    """The results of a run."""

    method: str
    history: pd.DataFrame  # of `train`
    records: pd.DataFrame  # of `evaluate` on the test patches
    probabilities: NDArray[np.float64]  # p before the first step, [K]
    trained_parameters: int  # their number


def finetune(
    run: "NetworkRun", evidence: Evidence, inputs: Mapping[str, str], name: str, folder: Path
) -> Run:
    """Fine-tune with one method, test, and write history, weights, records and a model card.

    A run that is there already, made by the same code with the same parameters from the same
    inputs, is read instead; one that was interrupted goes on. Low-rank updates are merged into the
    weights, if they are kept. Raises `InputError` where a method needs what the scoring lacks.

    Args:
        run: Network, patches and settings.
        evidence: What the scoring of the pretrained network says.
        inputs: Hashes of weights and probabilities.
        name: Name of the method.
        folder: Where the results go.
    """
    method, seed = find_method(name), run.parameters["seed"]
    model, rank, rate = run.pretrained(), 0, run.settings.learning_rate
    if method.low_rank:
        rank, rate = run.parameters["lora_rank"], run.parameters["lora_learning_rate"]
        seed_weights(seed, "finetuning")
        add_lora(model, rank)
    settings = replace(run.settings, learning_rate=rate * method.rate)
    steps = settings.epochs * len(settings.batch_sizes(len(run.training)))
    evidence = replace(evidence, seed=seed, epochs=settings.epochs, steps=steps)
    again = partial(_scored_again, run, evidence, model)
    sampler = method.sampler(replace(evidence, measure=again))
    p, trained = sampler.probabilities(0), trained_parameters(model)
    decisive = ("training_patches", "evaluation_patches", "tested_on", "processes")
    more = {"method": name, "seed": seed, "settings": asdict(settings), "lora_rank": rank}
    record = run.record(*decisive, inputs=inputs, **more)
    paths = [folder / "history.csv", folder / "records.csv"]
    keep_weights = run.parameters["keep_weights"]
    if keep_weights:
        paths += [folder / "weights.safetensors", folder / CARD]
    if all(is_made(path, record) for path in paths):
        discard_state(folder)  # where a kill came between the last result and this
        return Run(name, load_table(paths[0]), load_table(paths[1]), p, trained)
    tested = run.scenarios, run.training.classes, run.training.task_kind
    size = settings.batch_size
    identity = {**record.parameters, **record.inputs, "device": record.device}
    history = train(
        model, run.training, run.scenarios, sampler, settings, seed, folder, identity,
        lambda net: validation_scores(net, run.validation.batches(size), *tested), method.stream,
    )  # fmt: skip
    merge_lora(model)
    records = evaluate(model, run.test.batches(size), *tested, protocol=settings.protocol)
    save_table(paths[0], history, record)
    if keep_weights:
        save_weights(paths[2], model.state_dict(), record)
        save_model_card(folder, run.training, history, records, record)
    save_table(paths[1], records, record)
    discard_state(folder)
    return Run(name, history, records, p, trained)


def finetune_each(
    run: "NetworkRun",
    evidence: Evidence,
    inputs: Mapping[str, str],
    methods: Sequence[str],
    folder: Path,
) -> list[Run]:
    """Fine-tune with several methods, each in a folder of its name; see `finetune`."""
    return [finetune(run, evidence, inputs, name, folder / name) for name in methods]


def _scored_again(
    run: "NetworkRun", evidence: Evidence, model: torch.nn.Module
) -> NDArray[np.float64]:
    """Score the network as it is now, in all scenarios, with the settings of the scoring."""
    batches = run.training.batches(run.settings.batch_size)
    scores = score_scenarios(model, batches, run.scenarios, progress=False)
    now = replace(evidence, distortion=scores.distortion, latent_shift=scores.latent_shift)
    return now.scored().probabilities(0)
