"""A run of the notebooks 02 to 04, opened from the notebook's parameters.

The three notebooks work on one network: a backbone that is trained on one fold of a data set.
`open_run` gives them its patches, its settings, its folders and the records of what they write.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from lsgs_core.errors import InputError
from lsgs_core.models import Backbone
from lsgs_core.scenarios import ScenarioSet
from study.data.manifest import load_manifest
from study.data.patches import PatchDataset
from study.provenance.artifacts import Record, check
from study.provenance.devices import choose_device, make_deterministic
from study.provenance.freshness import NotebookStage, fingerprint
from study.stages.parameters import checked_parameters
from study.stages.tiers import NETWORK, NOTEBOOKS, StudyFolder
from study.training.checkpoints import build_network, load_checkpoint, network_configuration
from study.training.settings import TrainingSettings


@dataclass(frozen=True)
class NetworkRun:
    """One network on one fold of a data set, as the parameters of a notebook ask for it."""

    stage: NotebookStage
    parameters: Mapping[str, Any]
    study: StudyFolder
    training: PatchDataset
    validation: PatchDataset
    test: PatchDataset

    @property
    def scenarios(self) -> ScenarioSet:
        """Scenarios of the data set's modalities."""
        return ScenarioSet.of(self.training.modalities)

    @property
    def network(self) -> tuple[str, str, int, int]:
        """Data set, backbone, fold and seed of the pretraining, which name a network."""
        dataset, backbone, fold, seed = (self.parameters[name] for name in NETWORK)
        return dataset, backbone, fold, seed

    @property
    def weights(self) -> Path:
        """File of the pretrained weights."""
        return self.study.pretrained(*self.network) / "weights.safetensors"

    @property
    def scores(self) -> Path:
        """Folder of the scoring of the pretrained network."""
        return self.study.scores(*self.network)

    @property
    def settings(self) -> TrainingSettings:
        """Settings of a training."""
        names = [field.name for field in fields(TrainingSettings)]
        return TrainingSettings(**{n: self.parameters[n] for n in names if n in self.parameters})

    @property
    def device(self) -> torch.device:
        """Where this process computes."""
        return choose_device(self.parameters["device"])

    @cached_property
    def made_with(self) -> dict[str, Any]:
        """What weights and probabilities of this network must have been made with."""
        names = ("dataset", "task", "fold", "normalisation", "pretraining_seed")
        return {
            **{name: self.parameters[name] for name in names},
            "data_sha256": self.training.data_sha256,
            "patches_sha256": self.training.patches_sha256,
            "model": network_configuration(*self._built, self.training),
            "modalities": self.training.dataset.modalities,
            "classes": self.training.classes,
            "description": self.training.description.model_dump(),
        }

    @property
    def _built(self) -> tuple[str, str]:
        return self.parameters["backbone"], self.parameters["preset"]

    def build(self, device: str = "") -> Backbone:
        """Return the network with fresh weights, on the device of the run or on another."""
        return build_network(*self._built, self.training, device or self.device)

    def pretrained(self) -> Backbone:
        """Return the network with the pretrained weights of notebook 02, or raise `InputError`."""
        model = self.build()
        load_checkpoint(model, self.weights, self.made_with)
        return model

    def weights_sha256(self) -> str:
        """Return the hash of the pretrained weights, after checking what they were made with."""
        return str(check(self.weights, self.made_with)["sha256"])

    def record(self, *names: str, inputs: Mapping[str, str] | None = None, **more: Any) -> Record:
        """Return the record of an output of this run.

        Args:
            *names: Parameters of the notebook that decide the output, besides `made_with`.
            inputs: Hashes of what the output is made from; the stage's code is added.
            **more: What else decides it.
        """
        chosen = {name: self.parameters[name] for name in ("threads", *names)}
        made_from = {**(inputs or {}), "code": fingerprint(self.stage)}
        return Record({**self.made_with, **chosen, **more}, made_from, str(self.device))


def open_run(stage: NotebookStage, notebook: Mapping[str, Any]) -> NetworkRun:
    """Open the run that a notebook's parameters ask for, and fix threads and kernels.

    Names and values of the notebook are those of its `globals()`. Raises `InputError` where a
    parameter cannot be used, or the data are not prepared.
    """
    parameters = checked_parameters(NOTEBOOKS[stage], notebook)
    if parameters["pretraining_seed"] < 0:
        if "seed" not in parameters:
            raise InputError("pretraining_seed: expected 0 or more, the seed of one network")
        parameters["pretraining_seed"] = parameters["seed"]
    make_deterministic(parameters["threads"])
    study = StudyFolder(Path(parameters["work"]))
    dataset = load_manifest(Path(parameters["manifest"])).dataset(parameters["dataset"])
    source = study.prepared(parameters["dataset"]), dataset, parameters["task"], parameters["fold"]
    normalisation, workers = parameters["normalisation"], parameters["workers"]
    limit = parameters.get("evaluation_patches") or None
    most = parameters["training_patches"] or None
    training = PatchDataset(*source, "training", normalisation, most, workers)
    validation = PatchDataset(*source, "validation", normalisation, limit)
    test = PatchDataset(*source, parameters.get("tested_on", "test"), normalisation, limit)
    return NetworkRun(stage, parameters, study, training, validation, test)
