"""Sensors that are damaged instead of missing, by the protocols of arXiv 2503.18445.

A scenario says which sensors are whole. The others are missing (EMM, entire-missing modality, which
is what the rest of the study measures), or damaged: values are set to zero at random (RMM,
random-missing modality) or noisy (NM). Squares that are lost as a whole, as clouds take them, are
an addition. Zero is the mean of a band, and noise is in its standard deviations, where images are
standardised.
"""

from collections.abc import Callable
from functools import partial

import numpy as np
import pandas as pd
import torch
from torch import Generator, Tensor, nn
from tqdm.auto import tqdm

from lsgs_core.distributions import deployment_prior
from study.comparison.collection import Collected
from study.comparison.predictions import networks_of
from study.metrics.evaluation import calibration_errors, evaluate, expected, scenario_scores

SQUARE = 8  # pixels; side of the squares that are lost as a whole
RATES = 0.05, 0.1, 0.2  # at which every sensor fails by itself

Damage = Callable[[Tensor, Generator], Tensor]


def lose_values(images: Tensor, numbers: Generator, share: float) -> Tensor:
    """Set every value of images [B, D, H, W] to zero with a probability."""
    return images * (torch.rand(images.shape, generator=numbers) >= share).to(images.device)


def lose_squares(images: Tensor, numbers: Generator, share: float) -> Tensor:
    """Set every square of `SQUARE` pixels of images [B, D, H, W] to zero with a probability."""
    batch, _, height, width = images.shape
    places = batch, 1, -(-height // SQUARE), -(-width // SQUARE)
    kept = torch.rand(places, generator=numbers) >= share
    kept = kept.repeat_interleave(SQUARE, 2).repeat_interleave(SQUARE, 3)[..., :height, :width]
    return images * kept.to(images.device)


def add_salt_and_pepper(images: Tensor, numbers: Generator, share: float) -> Tensor:
    """Set a share of the pixels of images [B, D, H, W] to the least or greatest value of a band."""
    number = torch.rand((len(images), 1, *images.shape[2:]), generator=numbers).to(images.device)
    peppered = torch.where(number < share / 2, images.amin((2, 3), keepdim=True), images)
    return torch.where(number >= 1 - share / 2, images.amax((2, 3), keepdim=True), peppered)


def add_noise(images: Tensor, numbers: Generator, deviation: float) -> Tensor:
    """Add Gaussian noise of a standard deviation to images [B, D, H, W]."""
    return images + deviation * torch.randn(images.shape, generator=numbers).to(images.device)


DAMAGES: dict[str, Damage] = {
    **{f"RMM {share}": partial(lose_values, share=share) for share in (0.25, 0.5, 0.75)},
    **{f"squares {share}": partial(lose_squares, share=share) for share in (0.25, 0.5, 0.75)},
    "NM salt and pepper 0.1": partial(add_salt_and_pepper, share=0.1),
    **{f"NM Gaussian {sigma}": partial(add_noise, deviation=sigma) for sigma in (0.1, 0.2, 0.5)},
}


class Damaged(nn.Module):
    """A network that is given the sensors that a scenario lacks after all, but damaged.

    What is damaged depends on the order of the calls alone.
    """

    def __init__(self, network: nn.Module, damage: Damage) -> None:
        super().__init__()
        self.network, self.damage = network, damage
        self.numbers = Generator().manual_seed(0)

    def forward(self, images: list[Tensor], available: Tensor) -> Tensor:
        """Return the logits [B, C, H, W] of images, M tensors, and whole sensors, bool [B, M]."""
        shown, there = [], []
        for image, whole in zip(images, available.T, strict=True):
            with_data = (image != 0).any(dim=1, keepdim=True)  # where there is none, none comes
            damaged = self.damage(image, self.numbers) * with_data
            shown.append(torch.where(whole[:, None, None, None], image, damaged))
            there.append(shown[-1].flatten(1).any(dim=1) | whole)
        return self.network(shown, torch.stack(there, dim=1))


def robustness(grid: Collected) -> pd.DataFrame:
    """Measure networks by every protocol, on some patches of all blocks.

    They are those of `networks_of` before fine-tuning and with the first method after it.

    Returns:
        The columns dataset, network ("backbone/method"), protocol; IoU as `average`, over all
        scenarios alike ("Avg" in the source), and expected where sensors fail independently ("E"),
        a column for each rate; calibration_error, the mean over scenarios (EMM alone).
    """
    scenarios, size = grid.scenarios, grid.parameters["batch_size"]
    count = len(scenarios.modalities)
    priors = {f"fail {rate}": deployment_prior(scenarios, [rate] * count) for rate in RATES}
    priors = {"average": np.ones(len(scenarios)), **priors}
    rows = []
    for dataset, name, test, model in tqdm(networks_of(grid, 1), desc="damage", unit="network"):
        spread = np.linspace(0, len(test) - 1, grid.parameters["damaged_patches"])
        batches = list(test.batches(size, np.unique(spread.astype(int))))
        calibration = calibration_errors(model, batches, scenarios, test.task_kind)
        networks = {protocol: Damaged(model, damage) for protocol, damage in DAMAGES.items()}
        for protocol, network in {"EMM": model, **networks}.items():
            records = evaluate(network, batches, scenarios, test.classes, test.task_kind)
            scores = scenario_scores(records.assign(network=name), ["network"])
            iou = scores.set_index("scenario")["iou"].reindex(scenarios.names).to_numpy()
            row = {key: float(expected(iou, prior)) for key, prior in priors.items()}
            if protocol == "EMM":
                row["calibration_error"] = calibration["calibration_error"].mean()
            rows.append({"dataset": dataset, "network": name, "protocol": protocol, **row})
    return pd.DataFrame(rows)
