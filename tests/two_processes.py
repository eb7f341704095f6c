"""What test_devices.py runs in one process and in two: `python two_processes.py OUT`.

In an interpreter of its own: a fork hangs where a backward pass ran with two threads before.
"""

import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from study.metrics.evaluation import evaluate, validation_scores
from study.provenance.devices import in_processes
from study.stages.scoring import score
from study.training.loop import replace, train
from test_training import SCENARIOS, SETTINGS, Blobs, small

from lsgs_core.adaptive import LossProportional
from lsgs_core.models.lora import add_lora

torch.set_num_threads(1)
# In float64, where nothing but a mistake can make a difference: in float32 the gradients of this
# network differ by 1e-3 when sums change their order. It has no dropout, which every process draws
# for itself; and with low-rank updates its batch normalisation, whose statistics on a CPU are those
# of each process, is frozen.


class Patches(Blobs):
    patch_ids = np.arange(6)

    def batches_of(self, parts):
        for batch in super().batches_of(parts):
            images = tuple(image.double() for image in batch.images)
            yield replace(batch, images=images, target=batch.target.double())


def train_score_evaluate(folder: Path, protocol: str, accumulation: int) -> dict:
    """Train, and under the paper's loss score and evaluate."""
    folder.mkdir(exist_ok=True)
    settings = replace(SETTINGS, epochs=2, accumulation=accumulation, protocol=protocol)
    model = small("cbc_slp").double()
    if protocol == "paper":
        add_lora(model)
    patches = Patches(6)
    sampler = LossProportional([1 / 7] * 7, 0.5, 0.5 if protocol == "paper" else 0.0)
    history = train(
        model, patches, SCENARIOS, sampler, settings, 0, folder, {"data": 1},
        validate=lambda network: validation_scores(
            network, patches.batches(4, range(6)), SCENARIOS, ("bright",), "binary"
        ),
    )  # fmt: skip
    if protocol == "strict":
        return {"history": history.to_csv(index=False)}
    run = SimpleNamespace(
        parameters={"batch_size": 3, "pretraining_seed": 0, "scenario_budget": 0},
        pretrained=lambda: model,
        scenarios=SCENARIOS,
        training=patches,
        device=torch.device("cpu"),
    )
    scores = score(run, "latent", None)
    batches = list(patches.batches(3, range(6)))
    return {
        "history": history.to_csv(index=False),
        "records": evaluate(model, batches, SCENARIOS, ("bright",), "binary").to_csv(),
        "D": torch.from_numpy(scores.distortion),
        "shift": torch.from_numpy(scores.latent_shift),
        "ids": scores.patch_ids.tolist(),
        "weights": model.state_dict(),
        "average": torch.from_numpy(sampler.average),
        "count": sampler.count.tolist(),
    }


found = {}
# Two processes first: they are forks of this one, in which no backward pass may have run.
for case in ((2, "paper", 1), (2, "strict", 2), (1, "paper", 1), (1, "strict", 1)):
    count, *settings = case
    folder = Path(sys.argv[1], f"{count} {settings[0]}")
    found[folder.name] = in_processes(train_score_evaluate, (folder, *settings), count, "cpu")
torch.save(found, Path(sys.argv[1]) / "found.pt")
