"""What test_devices.py runs in one process or in two, in an interpreter of its own.

`python two_processes.py OUT PROCESSES ACCUMULATION PROTOCOL`
"""

import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from study.devices import in_processes
from study.evaluation import evaluate, validation_scores
from study.scoring import score
from study.training import replace, train
from test_training import SCENARIOS, SETTINGS, Blobs, small

from lsgs_core.adaptive import LossProportional
from lsgs_core.models.lora import add_lora

out, count, accumulation, protocol = sys.argv[1:]
torch.set_num_threads(1)
settings = replace(SETTINGS, epochs=2, accumulation=int(accumulation), protocol=protocol)
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


def train_score_evaluate(folder: Path) -> dict:
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


result = in_processes(train_score_evaluate, (Path(out),), int(count), "cpu")
torch.save(result, Path(out) / "result.pt")
