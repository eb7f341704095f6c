"""The drop-in of other people's loops; test_devices.py trains in two processes with it."""

import json
import re
from functools import partial

import numpy as np
import pytest
import torch
from torch.nn.functional import mse_loss
from torch.utils.data import DataLoader

from lsgs_core import HookedModel, InputError, ScenarioDropout, ScenarioSet, draw_scenarios
from lsgs_core.adaptive import LossProportional

SCENARIOS = ScenarioSet.of(["A", "B", "C"])
UNIFORM = [1 / 7] * 7
GENERATOR = torch.Generator().manual_seed(0)
SAMPLES = [(i, list(torch.randn(3, 2, 8, 8, generator=GENERATOR)), float(i % 2)) for i in range(10)]


def adaptive() -> ScenarioDropout:
    return ScenarioDropout(SCENARIOS, LossProportional(UNIFORM, 1.0, 0.5, memory=0.9))


class OwnLoop:
    """What a loop does with a batch, whoever calls it."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        layers = torch.nn.Conv2d(6, 4, 3), torch.nn.ReLU(), torch.nn.Conv2d(4, 1, 1)
        joined = partial(torch.cat, dim=1)
        self.network = HookedModel(
            torch.nn.Sequential(*layers), "1", lambda net, images: net(joined(images))
        )
        self.dropout, self.masks = adaptive(), {}

    def loss(self, network, batch, epoch):
        indices, images, target = batch
        images, available = self.dropout(images, indices, epoch)
        predicted = network(images, available).mean(dim=(1, 2, 3))
        losses = mse_loss(predicted, target.float(), reduction="none")
        self.dropout.observe(losses)
        self.masks |= {(epoch, int(i)): a.tolist() for i, a in zip(indices, available, strict=True)}
        return losses.mean()


def plain(loop, loader, optimiser, network=None, backward=torch.Tensor.backward):
    for epoch in range(3):
        for batch in loader:
            optimiser.zero_grad()
            backward(loop.loss(network or loop.network, batch, epoch))
            optimiser.step()


def with_accelerate(loop, loader, optimiser):
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    network, optimiser, loader = accelerator.prepare(loop.network, optimiser, loader)
    plain(loop, loader, optimiser, network, accelerator.backward)


def with_lightning(loop, loader, optimiser):
    import lightning

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.network = loop.network

        def training_step(self, batch, _):
            return loop.loss(self.network, batch, self.current_epoch)

        def configure_optimizers(self):
            return optimiser

    quiet = dict.fromkeys(
        ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False
    )
    lightning.Trainer(accelerator="cpu", max_epochs=3, **quiet).fit(Module(), loader)


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("fit", [with_lightning, with_accelerate])
def test_the_same_in_every_loop(fit):
    loops = OwnLoop(), OwnLoop()
    for loop, train in zip(loops, (plain, fit), strict=True):
        optimiser = torch.optim.Adam(loop.network.parameters(), 0.01)
        train(loop, DataLoader(SAMPLES, batch_size=4), optimiser)
    first, second = loops
    assert len(first.masks) == first.dropout.sampler.count.sum() == 30
    assert first.masks == second.masks
    assert first.dropout.state_dict() == second.dropout.state_dict()
    for one, other in zip(*(loop.network.parameters() for loop in loops), strict=True):
        torch.testing.assert_close(one, other)


def test_draws_are_those_of_the_method_and_absent_pixels_are_gone():
    p = np.array([0.1, 0.2, 0.3, 0.1, 0.1, 0.1, 0.1])
    dropout = ScenarioDropout(SCENARIOS, p, seed=3, stage="pretraining")
    images = [torch.full((5, d, 4, 4), float("nan")) for d in (1, 2, 3)]
    indices = torch.tensor([7, 0, 2, 9, 4])
    drawn = draw_scenarios(p, 3, 2, indices.numpy(), stage="pretraining")
    blanked, available = dropout(images, indices, epoch=2)
    assert available.tolist() == SCENARIOS.masks[drawn].tolist()
    for m, image in enumerate(blanked):
        assert torch.equal(image.isnan().flatten(1).all(dim=1), available[:, m])
        assert (image[~available[:, m]] == 0).all()
        assert images[m].isnan().all()  # the caller's stay as they are
    ordered = [image.to(memory_format=torch.channels_last) for image in images]
    for image, same in zip(dropout(ordered, indices, 2)[0], blanked, strict=True):
        assert image.is_contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(image, same, equal_nan=True)
    has = torch.tensor([[True, False, True]] * 5)
    _, available = dropout(images, [7, 0, 2, 9, 4], 2, has)
    assert not available[:, 1].any()


def test_losses_belong_to_the_last_draw_and_the_state_is_kept():
    dropout = adaptive()
    dropout.draw([5, 6, 7], 0)  # a step that was skipped, or one of the validation
    drawn = dropout.draw([1, 2], 0)
    dropout.observe(torch.tensor([1.0, float("nan")]))
    assert dropout.sampler.count.tolist() == [float(k == drawn[0]) for k in range(7)]
    with pytest.raises(InputError, match="loss: expected one draw before each observe"):
        dropout.observe(torch.ones(2))
    dropout.draw([3], 0)
    with pytest.raises(InputError, match=r"loss: expected shape \[1\], found \[\]"):
        dropout.observe(torch.tensor(1.0))
    dropout.observe(torch.tensor([float("nan")]))  # the draw is still there after an error
    dropout.observe(torch.ones(3), np.array([0, 0, 6]))  # several draws together
    again = adaptive()
    again.load_state_dict(json.loads(json.dumps(dropout.state_dict())))
    assert again.draw(range(50), 1).tolist() == dropout.draw(range(50), 1).tolist()
    with pytest.raises(InputError, match="the same scenario probabilities"):
        ScenarioDropout(SCENARIOS, UNIFORM).load_state_dict(dropout.state_dict())


IMAGES = [torch.ones(2, 1, 4, 4)] * 3


@pytest.mark.parametrize(
    ("changed", "answer"),
    [
        ({"sampler": [0.5, 0.5]}, "sampler: expected one per scenario (7), found 2"),
        ({"sampler": "lsgs"}, "sampler: expected finite real numbers, found 'lsgs'"),
        ({"images": IMAGES[:2]}, "images: expected 3 tensors, found 2"),
        ({"images": [0, 1, 2]}, "images: expected a Tensor, found 0"),
        ({"indices": [4, 5, 6]}, "images: expected shape [3, any, any, any], found [2, 1, 4, 4]"),
        ({"indices": torch.ones(2)}, "indices: expected an array of integers"),
        ({"available": torch.ones(1, 3) > 0}, "available: expected shape [2, 3], found [1, 3]"),
    ],
)
def test_what_is_wrong_is_named(changed, answer):
    right = {"sampler": UNIFORM, "images": IMAGES, "indices": [4, 5], "available": None}
    sampler, images, indices, available = (right | changed).values()
    with pytest.raises(InputError, match=re.escape(answer)):
        ScenarioDropout(SCENARIOS, sampler)(images, indices, 0, available)
