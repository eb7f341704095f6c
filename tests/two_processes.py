"""What test_devices.py runs in two processes, and in one for comparison."""

import sys
from pathlib import Path

import torch
from study.devices import is_first_process
from study.evaluation import evaluate, validation_scores
from study.training import replace, train
from test_training import SCENARIOS, SETTINGS, Blobs, small

from lsgs_core.adaptive import LossProportional
from lsgs_core.distortion import score_scenarios

torch.set_num_threads(1)
out = Path(sys.argv[1])
settings = replace(SETTINGS, epochs=2, accumulation=int(sys.argv[2]), precision=sys.argv[3])
# Without dropout, which every process draws for itself; in float64, where nothing but a mistake can
# make a difference: in float32 gradients of this network differ by 1e-3 when sums change order.
double = sys.argv[3] == "float32"
model = small("cbc_slp").double() if double else small("cbc_slp")


class Patches(Blobs):
    def batches_of(self, parts):
        for batch in super().batches_of(parts):
            if double:
                images = tuple(image.double() for image in batch.images)
                batch = replace(batch, images=images, target=batch.target.double())
            yield batch


patches = Patches(10)
sampler = LossProportional([1 / 7] * 7, 0.5, 0.5)
history = train(
    model, patches, SCENARIOS, sampler, settings, 0, out, {"data": 1}, progress=False,
    validate=lambda network: validation_scores(
        network, patches.batches(4, range(10)), SCENARIOS, ("bright",), "binary"
    ),
)  # fmt: skip
order = list(range(10))
batches = list(patches.batches(3, order))
scores = score_scenarios(model, batches, SCENARIOS, progress=False)
records = evaluate(model, batches, SCENARIOS, ("bright",), "binary")
if is_first_process():
    history.to_csv(out / "history.csv")
    records.to_csv(out / "records.csv")
    kept = {"D": scores.distortion, "shift": scores.latent_shift, "ids": scores.patch_ids}
    torch.save({name: torch.tensor(value) for name, value in kept.items()}, out / "scores.pt")
    torch.save(model.state_dict(), out / "weights.pt")
    torch.save(sampler.state_dict(), out / "sampler.pt")
if torch.distributed.is_initialized():
    torch.distributed.destroy_process_group()
