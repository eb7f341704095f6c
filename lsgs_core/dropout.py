"""The method in a training loop of one's own: which modalities each sample has."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

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
        if not isinstance(sampler, ScenarioSampler):
            sampler = FixedSampler(check_probabilities(sampler, name="sampler"))
        check_probabilities(sampler.probabilities(0), len(scenarios), "sampler")
        generator(stream, seed, stage=stage)  # checks them before the first draw
        self.scenarios, self.sampler = scenarios, sampler
        self.seed, self.stream, self.stage = seed, stream, stage
        self._drawn: NDArray[np.int64] | None = None  # the last draw, until its losses are there

    def draw(
        self, indices: Sequence[int] | Tensor, epoch: int, available: Tensor | None = None
    ) -> NDArray[np.int64]:
        """Return the index of each sample's scenario, int64 [B]; arguments as in a call."""
        own = indices.cpu() if isinstance(indices, Tensor) else indices
        samples, servable = array_of("indices", own, "iu", [None]), None
        if available is not None:
            check_type("available", available, Tensor)
            shape = [len(samples), self.scenarios.masks.shape[1]]
            absent = ~array_of("available", available.cpu(), "b", shape)
            servable = ~(self.scenarios.masks & absent[:, None]).any(axis=2)  # [B, K]
        p, own_numbers = self.sampler.probabilities(epoch), (self.stream, self.stage)
        self._drawn = drawn = draw_scenarios(p, self.seed, epoch, samples, servable, *own_numbers)
        return drawn

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
        if len(images) != present.shape[1]:
            raise InputError(f"images: expected {present.shape[1]} tensors, found {len(images)}")
        for image in images:
            check_type("images", image, Tensor)
            check_shape("images", image, [len(present), None, None, None])  # as many as indices
        present = present.to(images[0].device)
        absent = ~present[:, :, None, None, None]
        # A clone keeps the memory order, such as channels last.
        return [x.clone().masked_fill_(absent[:, m], 0) for m, x in enumerate(images)], present

    def observe(self, loss: Tensor, drawn: NDArray[np.int64] | None = None) -> None:
        """Let the sampler learn; one that does not adapt ignores the losses.

        Args:
            loss: Loss of each sample, [B]; NaN, for a sample without a labelled pixel, is skipped.
            drawn: Scenario of each sample, int64 [B]; None is the last draw's, which serves once.
        """
        scenario = self._drawn if drawn is None else array_of("drawn", drawn, "iu", [None])
        if scenario is None:
            expected = "one draw before each observe, in this process, or its scenarios as `drawn`"
            raise InputError(f"loss: expected {expected}, found neither")
        check_type("loss", loss, Tensor)
        check_shape("loss", loss, [len(scenario)])
        if not loss.is_floating_point():
            raise InputError(f"loss: expected floating-point numbers, found {loss.dtype}")
        self._drawn = None
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
