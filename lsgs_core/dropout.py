"""The method in a training loop of one's own: which modalities each sample has."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from lsgs_core.batch import Batch
from lsgs_core.errors import InputError, array_of, check_shape, check_type
from lsgs_core.randomness import Stage, generator
from lsgs_core.sampling import FixedSampler, ScenarioSampler, check_probabilities, draw_scenarios
from lsgs_core.scenarios import ScenarioSet


class ScenarioDropout:
    """Draws the scenario of every sample, blanks what is absent, and passes the losses on.

    A draw depends on seed, epoch and the sample's index in its data set alone. In several processes
    of `torch.distributed`, which Lightning and accelerate use, each draws for its own samples, and
    a sampler that adapts learns from the losses of all: each process then calls as often.

    Args:
        scenarios: K scenarios of M modalities.
        sampler: Probabilities, [K], or a sampler, such as `find_method(name).sampler(evidence)`.
        seed: Random seed of the run; `stream` and `stage`, too, are those of `draw_scenarios`.

    Example:
        >>> dropout = ScenarioDropout(ScenarioSet.of(["A", "B"]), [0.5, 0.5, 0])
        >>> images = [torch.ones(3, 4, 8, 8), torch.ones(3, 1, 8, 8)]
        >>> images, available = dropout(images, indices=[7, 0, 2], epoch=0)
        >>> available.tolist()
        [[True, False], [True, False], [False, True]]
        >>> dropout.observe(torch.tensor([0.3, 0.9, 0.4]))  # for samplers that adapt
    """

    def __init__(
        self,
        scenarios: ScenarioSet,
        sampler: ScenarioSampler | ArrayLike,
        seed: int = 0,
        stream: str = "scenario",
        stage: Stage = "finetuning",
    ) -> None:
        check_type("scenarios", scenarios, ScenarioSet)
        self.sampler = sampler if isinstance(sampler, ScenarioSampler) else FixedSampler(sampler)
        check_probabilities(self.sampler.probabilities(0), len(scenarios))
        generator(stream, seed, stage=stage)  # checks them before the first draw
        self.scenarios, self.seed, self.stream, self.stage = scenarios, seed, stream, stage
        self._drawn = np.empty(0, np.int64)  # the last draw, until its losses are there

    def draw(
        self, indices: Sequence[int] | Tensor, epoch: int, available: Tensor | None = None
    ) -> NDArray[np.int64]:
        """Return the index of each sample's scenario, int64 [B]; arguments as in a call."""
        servable: Any = None
        if available is not None:
            check_type("available", available, Tensor)
            shape = [None, self.scenarios.masks.shape[1]]
            absent = ~array_of("available", available.cpu(), "b", shape)
            servable = ~(self.scenarios.masks & absent[:, None]).any(axis=2)  # [B, K]
        samples: Any = indices.cpu().numpy() if isinstance(indices, Tensor) else indices
        p = self.sampler.probabilities(epoch)
        self._drawn = draw_scenarios(
            p, self.seed, epoch, samples, servable, self.stream, self.stage
        )
        return self._drawn

    def __call__(
        self,
        images: Sequence[Tensor],
        indices: Sequence[int] | Tensor,
        epoch: int,
        available: Tensor | None = None,
    ) -> tuple[list[Tensor], Tensor]:
        """Return copies with absent modalities at zero, and what is available, bool [B, M].

        Args:
            images: M tensors [B, D_m, H, W].
            indices: Index of each sample in its data set, [B].
            epoch: Epoch, counted from 0.
            available: bool [B, M], the modalities that a sample has files of; None is all.
        """
        check_type("images", images, Sequence)
        present = torch.from_numpy(self.scenarios.masks[self.draw(indices, epoch, available)])
        images = Batch(tuple(images), present).images  # checks the shapes
        present = present.to(images[0].device)
        absent = ~present[:, :, None, None, None]
        return [image.masked_fill(absent[:, m], 0) for m, image in enumerate(images)], present

    def observe(self, loss: Tensor, drawn: NDArray[np.int64] | None = None) -> None:
        """Let the sampler learn; one that does not adapt ignores the losses.

        Args:
            loss: Loss of each sample, [B]; NaN, for a sample without a labelled pixel, is skipped.
            drawn: Scenario of each sample, int64 [B]; None takes those of the last draw, once.
        """
        scenario = self._drawn if drawn is None else array_of("drawn", drawn, "iu", [None])
        self._drawn = self._drawn[:0]
        check_type("loss", loss, Tensor)
        check_shape("loss", loss, [len(scenario)])
        if not loss.is_floating_point():
            raise InputError(f"loss: expected floating-point numbers, found {loss.dtype}")
        if type(self.sampler).observe is ScenarioSampler.observe:
            return  # processes need not wait for each other
        everyone: list[Any] = [(scenario, loss.detach().cpu().double().numpy())]
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            own, everyone = everyone[0], everyone * torch.distributed.get_world_size()
            torch.distributed.all_gather_object(everyone, own)
        scenario, losses = (np.concatenate(parts) for parts in zip(*everyone, strict=True))
        self.sampler.observe(scenario[~np.isnan(losses)], losses[~np.isnan(losses)])

    def state_dict(self) -> dict[str, Any]:
        """Return what the sampler has learnt, between two steps; a dictionary for JSON."""
        return self.sampler.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a saved state, or raise `InputError` where it is that of another sampler."""
        self.sampler.load_state_dict(state)
