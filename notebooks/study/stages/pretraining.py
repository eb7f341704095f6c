"""Pretraining with random modality dropout, and what scoring takes for granted of a network."""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from lsgs_core.batch import Batch
from lsgs_core.errors import InputError
from lsgs_core.methods import find_method, without_evidence
from lsgs_core.models import Backbone
from lsgs_core.scenarios import ScenarioSet
from study.metrics.evaluation import validation_scores
from study.provenance.artifacts import Record, is_made, load_table
from study.provenance.devices import in_processes, seed_weights
from study.provenance.files import file_sha256
from study.training.checkpoints import Pretrained, errors_named, is_own, load_pretrained
from study.training.loop import train

if TYPE_CHECKING:
    from study.stages.run import NetworkRun

# Differences below this, relative to the size of the latent, are float32 rounding.
TOLERANCE = 1e-4
CHECKED_PATCHES = 3


def pretrained_network(run: "NetworkRun") -> tuple[Backbone, Pretrained, Record]:
    """Load the pretrained network of a run, or train it, by its parameter `weights`.

    Returns the network on the device of the run, where its weights are from, and the record of what
    is written about it.

    A training that was finished with the same parameters, data and code is read instead. Raises
    `InputError` for weights that are not there, or are those of another network.
    """
    weights, names = run.parameters["weights"], ("weights", "evaluation_patches")
    if weights != "train":
        model = run.build()
        loaded = load_pretrained(model, weights, Path(run.parameters["manifest"]), run.made_with)
        inputs = {"weights": file_sha256(loaded.path)}
        record = run.record(*names, inputs=inputs, trained_with=loaded.trained_with)
        return model, loaded, record
    here = {name: run.parameters[name] for name in ("drawn_by", "training_patches", "processes")}
    trained_with = {"settings": asdict(run.settings), **here}
    record = run.record(*names, trained_with=trained_with)
    history = run.weights.with_name("history.csv")
    if is_made(run.weights, record) and is_made(history, record):
        before = "trained here before", trained_with, load_table(history)
        return run.pretrained(), Pretrained(run.weights, *before), record
    if is_own(name := run.parameters["backbone"]):
        expect_fit(name, run)
    processes, device = run.parameters["processes"], run.parameters["device"]
    trained, state = in_processes(pretrain, (run, record), processes, device)
    model = run.build()
    model.load_state_dict(state)
    return model, Pretrained(run.weights, "trained here", trained_with, trained), record


def expect_fit(name: str, run: "NetworkRun") -> None:
    """Check a network of one's own with fresh weights, before the long work; raise `InputError`."""
    model, batches = run.build("cpu"), run.training.batches(run.settings.batch_size)
    with errors_named(f"backbone {name}"):
        checks = check_network(model, batches, run.scenarios)
    for row in checks[~checks["passed"]].itertuples():
        raise InputError(
            f"backbone {name}: {row.check}: expected at most {row.allowed:g}, found {row.found:.3g}"
        )


def pretrain(run: "NetworkRun", record: Record) -> tuple[pd.DataFrame, dict[str, Tensor]]:
    """Train a network, in every process that shares it, or go on with what the record names.

    Returns the history, as `train` returns it, and the weights on the CPU.
    """
    seed, size = run.parameters["pretraining_seed"], run.settings.batch_size
    patches, scenarios = run.validation, run.scenarios
    seed_weights(seed, "pretraining")
    model, tested = run.build(), (scenarios, patches.classes, patches.task_kind)
    steps = run.settings.epochs * len(run.settings.batch_sizes(len(run.training)))
    evidence = replace(without_evidence(scenarios), steps=steps)
    sampler = find_method(run.parameters["drawn_by"]).sampler(evidence)
    history = train(
        model, run.training, scenarios, sampler, run.settings, seed, run.weights.parent,
        {**record.parameters, "device": record.device},
        lambda network: validation_scores(network, patches.batches(size), *tested),
        stage="pretraining",
    )  # fmt: skip
    return history, {name: value.cpu() for name, value in model.state_dict().items()}


def check_network(
    model: Backbone, batches: Iterable[Batch], scenarios: ScenarioSet
) -> pd.DataFrame:
    """Make sure of what scoring takes for granted, on the first patches with every modality.

    The network is left in evaluation mode. Without any such patch, `InputError` is raised.

    Returns:
        One row per check: check, found (largest relative difference of latents and logits, or
        count), allowed, passed.
    """
    model.eval()
    device = next(model.parameters()).device
    images = [image.to(device) for image in _complete_images(batches)]
    masks = torch.tensor(scenarios.masks, device=device)
    full = torch.ones(len(images[0]), len(images), dtype=torch.bool, device=device)

    def outputs(images: Sequence[Tensor], present: Tensor) -> tuple[Tensor, Tensor]:
        return model.latent([*images], present), model([*images], present)

    absent = []
    with torch.no_grad():
        shared = model.scenario_latents(images, masks)
        together = outputs(images, full)
        patches = zip(*(image.split(1) for image in images), strict=True)
        parts = [outputs(patch, full[:1]) for patch in patches]
        alone = map(torch.cat, zip(*parts, strict=True))
        for gone, image in enumerate(images):
            present = full.clone()
            present[:, gone] = False
            others = [*images[:gone], torch.full_like(image, 1e3), *images[gone + 1 :]]
            absent.append(_difference(outputs(images, present), outputs(others, present)))
    values = *model.state_dict().values(), *together
    not_finite = sum(not bool(torch.isfinite(value).all()) for value in values)
    rows = [
        ("entries that are not finite", float(not_finite), 0.0),
        ("D of the full scenario", _difference([shared[scenarios.full]], together[:1]), TOLERANCE),
        ("a patch alone and in a batch", _difference(alone, together), TOLERANCE),
        ("pixels of an absent modality", float(np.max(absent)), 0.0),
    ]
    table = pd.DataFrame(rows, columns=["check", "found", "allowed"])
    return table.assign(passed=table["found"] <= table["allowed"])


def _complete_images(batches: Iterable[Batch]) -> list[Tensor]:
    """Images of the first complete patches, one tensor per modality."""
    complete = (
        [image[place] for image in batch.images]
        for batch in batches
        for place in batch.complete.nonzero()[:, 0]
    )
    first = [*islice(complete, CHECKED_PATCHES)]
    if not first:
        raise InputError("expected a patch that every modality sees, found none")
    return [torch.stack(images) for images in zip(*first, strict=True)]


def _difference(first: Iterable[Tensor], second: Iterable[Tensor]) -> float:
    """Largest difference relative to the root mean square of the second; NaN where there is one."""
    pairs = zip(first, second, strict=True)
    scaled = [(a - b).abs().max() / b.square().mean().sqrt().clamp(min=1e-12) for a, b in pairs]
    return float(torch.stack(scaled).max())
