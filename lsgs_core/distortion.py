"""Distortion: how far each scenario moves the shared latent of a pretrained network.

With z(x, k) the latent of patch x under scenario k, d_k(x) is the mean over all elements of
(z(x, k) - z(x, full))^2 and D_k its mean over the training patches (arXiv 2605.20372, scenario
scoring). Evaluation mode, so D_full = 0.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from tqdm.auto import tqdm

from lsgs_core.batch import Batch
from lsgs_core.errors import InputError
from lsgs_core.scenarios import ScenarioSet


@dataclass(frozen=True)
class ScenarioScores:
    """What a scoring measured, over N patches and K scenarios.

    Attributes:
        scenarios: The scenarios, in the order of every K axis.
        distortion: D, float64 [K].
        standard_error: Of D, clustered by block, float64 [K]; NaN with a single block.
        patch_distortion: d_k(x), float64 [N, K].
        latent_shift: Mean over patches and positions of z(x, k) - z(x, full), per latent channel,
            float64 [K, C].
        patch_ids: int64 [N]; 0 ... N-1 where the batches carry none.
        block_ids: Spatial block of every patch, int64 [N]; the patch id where batches carry none.
    """

    scenarios: ScenarioSet
    distortion: NDArray[np.float64]
    standard_error: NDArray[np.float64]
    patch_distortion: NDArray[np.float64]
    latent_shift: NDArray[np.float64]
    patch_ids: NDArray[np.int64]
    block_ids: NDArray[np.int64]


@dataclass(frozen=True)
class BatchScores:
    """What one batch adds to a scoring, over B complete patches and K scenarios.

    Attributes:
        distortion: d_k(x), float64 [B, K].
        shift: Sum over the patches of the mean latent shift per channel, float64 [K, C].
        patch_ids: int64 [B].
        block_ids: Spatial block of every patch, int64 [B].
    """

    distortion: NDArray[np.float64]
    shift: NDArray[np.float64]
    patch_ids: NDArray[np.int64]
    block_ids: NDArray[np.int64]


def score_scenarios(
    model: nn.Module,
    batches: Iterable[Batch | Tensor | Sequence[Tensor]],
    scenarios: ScenarioSet,
    device: torch.device | str | None = None,
    until: Callable[[NDArray[np.float64], NDArray[np.int64]], bool] | None = None,
    progress: bool = True,
) -> ScenarioScores:
    """Measure the distortion of every scenario.

    The model needs `latent(images, available)`; where it has `scenario_latents(images, masks)`,
    that one is used, which lets a backbone share work between scenarios, and where it has
    `for_scoring()`, the copy that this returns. No decoder runs, and the full scenario is computed
    once. Parameters and the training mode are left as they were.

    Args:
        model: A backbone, or any module with the methods above.
        batches: `Batch` objects, or images alone: M tensors [B, D_m, H, W] or one [B, M, D, H, W].
            Patches that a modality does not see, or sees less of than another, are left out:
            distortion is against the full scenario.
        scenarios: Which scenarios, for the modalities in the model's order.
        device: Where to compute; None: where the model's parameters are.
        until: Stopping rule such as `diagnostics.stop_when_precise`, called after every batch with
            d_k(x) and the blocks of the patches so far, which must come in random order. None:
            score all batches.
        progress: Show a progress bar over the batches.

    Returns:
        Distortions with their clustered standard errors, and what later steps use.

    Raises:
        InputError: No complete patch, or a latent that is not finite (names the patches).
    """
    found: list[BatchScores] = []
    for part in score_batches(model, batches, scenarios, device, progress):
        found.append(part)
        if until and until(
            np.concatenate([one.distortion for one in found]),
            np.concatenate([one.block_ids for one in found]),
        ):
            break
    return joined_scores(found, scenarios)


def score_batches(
    model: nn.Module,
    batches: Iterable[Batch | Tensor | Sequence[Tensor]],
    scenarios: ScenarioSet,
    device: torch.device | str | None = None,
    progress: bool = True,
) -> Iterator[BatchScores]:
    """Measure batch by batch, for callers that share batches out or stop in between.

    Args:
        model: As in `score_scenarios`, like the other arguments.
        batches: Likewise.
        scenarios: Likewise.
        device: Likewise.
        progress: Likewise.

    Yields:
        The scores of every batch that has a complete patch.

    Raises:
        InputError: Images of another number of modalities, or a latent that is not finite.
    """
    parameter = next(model.parameters(), None)
    target = torch.device(device or (parameter.device if parameter is not None else "cpu"))
    masks = torch.tensor(scenarios.masks, device=target)
    seen = 0
    training = model.training
    model.eval()
    try:
        scored: Any = model
        if hasattr(scored, "for_scoring"):
            scored = scored.for_scoring()
        for item in tqdm(batches, desc="scoring", unit="batch", disable=not progress):
            images, ids, blocks = _complete_patches(item, seen)
            seen += len(ids)
            if len(images) != masks.shape[1]:
                raise InputError(
                    f"scoring: expected images of {masks.shape[1]} modalities, found {len(images)}"
                )
            if not len(ids):
                continue
            with torch.inference_mode():  # not around the yield, where it would reach the caller
                latents = _latents(scored, [image.to(target) for image in images], masks)
                distortion, shift = _distortion(latents, scenarios.full)
            if not np.isfinite(distortion).all():
                bad = ids[~np.isfinite(distortion).all(axis=1)]
                raise InputError(f"scoring: the latent of patches {bad.tolist()} is not finite")
            yield BatchScores(distortion, shift, ids, blocks)
    finally:
        model.train(training)


def joined_scores(parts: Sequence[BatchScores], scenarios: ScenarioSet) -> ScenarioScores:
    """Put the scores of batches together, in the order of the batches.

    Raises:
        InputError: There is no part: no batch had a complete patch.
    """
    if not parts:
        raise InputError("scoring: expected at least one patch with every modality, found none")
    patch_distortion = np.concatenate([part.distortion for part in parts])
    block_ids = np.concatenate([part.block_ids for part in parts])
    return ScenarioScores(
        scenarios=scenarios,
        distortion=patch_distortion.mean(axis=0),
        standard_error=clustered_standard_error(patch_distortion, block_ids),
        patch_distortion=patch_distortion,
        latent_shift=np.sum([part.shift for part in parts], axis=0) / len(patch_distortion),
        patch_ids=np.concatenate([part.patch_ids for part in parts]),
        block_ids=block_ids,
    )


def clustered_standard_error(
    values: NDArray[np.float64], clusters: NDArray[np.int64]
) -> NDArray[np.float64]:
    """Standard error of the mean when values within a cluster are dependent.

    Overlapping windows of one block see the same pixels, so the block is the unit: with G clusters,
    se^2 = G / (G - 1) * sum over clusters of (sum of residuals)^2 / N^2 (the sandwich estimator of
    Liang and Zeger 1986 for a mean). With every value its own cluster it is the usual one.

    Args:
        values: One row per observation, [N, K].
        clusters: Cluster of every observation, [N].

    Returns:
        Standard error per column, float64 [K]; NaN with a single cluster.
    """
    labels, position = np.unique(clusters, return_inverse=True)
    sums = np.zeros((len(labels), values.shape[1]))
    np.add.at(sums, position, values - values.mean(axis=0))
    if len(labels) < 2:
        return np.full(values.shape[1], np.nan)
    correction = len(labels) / (len(labels) - 1)
    return np.sqrt(correction * np.square(sums).sum(axis=0)) / len(values)


def _complete_patches(
    item: Batch | Tensor | Sequence[Tensor], first_id: int
) -> tuple[list[Tensor], NDArray[np.int64], NDArray[np.int64]]:
    """Images of the patches with every modality, their ids and their blocks."""
    if isinstance(item, Batch):
        keep = item.complete.cpu()
        images = [image if bool(keep.all()) else image[keep] for image in item.images]
        ids = _identifiers(item.patch_ids, len(keep), first_id)[keep.numpy()]
        if item.block_ids is None:
            return images, ids, ids
        return images, ids, item.block_ids.cpu().numpy().astype(np.int64)[keep.numpy()]
    images = list(item.unbind(dim=1)) if isinstance(item, Tensor) else list(item)
    ids = _identifiers(None, len(images[0]), first_id)
    return images, ids, ids


def _identifiers(ids: Tensor | None, count: int, first: int) -> NDArray[np.int64]:
    if ids is None:
        return np.arange(first, first + count, dtype=np.int64)
    return ids.cpu().numpy().astype(np.int64)


def _latents(model: Any, images: list[Tensor], masks: Tensor) -> Tensor:
    if hasattr(model, "scenario_latents"):
        return model.scenario_latents(images, masks)
    count = len(images[0])
    return torch.stack([model.latent(images, mask.expand(count, -1)) for mask in masks])


def _distortion(latents: Tensor, full: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Distortion per patch, [B, K], and the sum over patches of the mean shift, [K, C].

    `latents` is [K, B, C, ...]. Differences are taken in the latent's own precision and accumulated
    in float64; scenario by scenario, so that no float64 copy of all the latents is made.
    """
    reference = latents[full]
    distortion, shift = [], []
    for latent in latents:
        difference = (latent - reference).double()
        difference = difference.reshape(*difference.shape[:2], -1)  # (B, C, positions)
        distortion.append(difference.square().mean(dim=(1, 2)))
        shift.append(difference.mean(dim=2).sum(dim=0))
    return torch.stack(distortion, dim=1).cpu().numpy(), torch.stack(shift).cpu().numpy()
