"""Distortion: how far each scenario moves the shared latent of a pretrained network.

With z(x, k) the latent of patch x under scenario k, d_k(x) is the mean over all elements of
(z(x, k) - z(x, full))^2, and D_k is the mean of d_k over the training patches (arXiv 2605.20372,
scenario scoring). The network is in evaluation mode, so that D of the full scenario is 0.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
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
    """The result of scoring K scenarios on N patches.

    Attributes:
        scenarios: The scenarios, in the order of every K axis.
        distortion: D, float64 [K].
        standard_error: Standard error of D, clustered by block, float64 [K]; NaN for one block.
        patch_distortion: d_k(x), float64 [N, K].
        latent_shift: Mean of z(x, k) - z(x, full) over patches and positions, for each latent
            channel, float64 [K, C].
        patch_ids: Identifiers of the patches, int64 [N]; 0 to N - 1 where batches carry none.
        block_ids: Spatial block of each patch, int64 [N]; `patch_ids` where batches carry none.
    """

    scenarios: ScenarioSet
    distortion: NDArray[np.float64]
    standard_error: NDArray[np.float64]
    patch_distortion: NDArray[np.float64]
    latent_shift: NDArray[np.float64]
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

    The model needs a method `latent(images, available)`. Two more are used where a model has them:
    `scenario_latents(images, masks)`, by which a backbone shares work between scenarios, and
    `for_scoring()`, which returns a faster copy. No decoder runs. Parameters and the training mode
    of the model are left as they were.

    Args:
        model: A backbone, or any module with the methods above.
        batches: `Batch` objects, or images alone: M tensors [B, D_m, H, W] or one [B, M, D, H, W].
            A patch is skipped where a modality is not available or observes fewer pixels than
            another, because distortion is measured against the full scenario.
        scenarios: The scenarios, with modalities in the order of the images.
        device: Device of the computation; None takes that of the model's parameters.
        until: Stopping rule, called after each batch with d_k(x) [N, K] and the block ids [N] of
            all patches so far; True ends the scoring. Patches must then come in random order.
        progress: True shows a progress bar over the batches.

    Returns:
        Distortions with clustered standard errors, and the values that later steps use.

    Raises:
        InputError: No patch is complete, images have another number of modalities, or a latent is
            not finite (the message names the patches).
    """
    parameter = next(model.parameters(), None)
    target = torch.device(device or (parameter.device if parameter is not None else "cpu"))
    masks = torch.tensor(scenarios.masks, device=target)
    distortions: list[NDArray[np.float64]] = []
    shifts: list[NDArray[np.float64]] = []
    patch_ids: list[NDArray[np.int64]] = []
    block_ids: list[NDArray[np.int64]] = []
    position = 0  # of the first patch of a batch
    training = model.training
    model.eval()
    try:
        scored: Any = model
        if hasattr(scored, "for_scoring"):
            scored = scored.for_scoring()
        for batch in tqdm(batches, desc="scoring", unit="batch", disable=not progress):
            images, ids, blocks, count = _complete_patches(batch, position)
            position += count
            if len(images) != masks.shape[1]:
                raise InputError(
                    f"batches: expected images of {masks.shape[1]} modalities, found {len(images)}"
                )
            if not len(ids):
                continue
            with torch.inference_mode():
                latents = _latents(scored, [image.to(target) for image in images], masks)
                distortion, shift = _distortion(latents, scenarios.full)
            finite = np.isfinite(distortion).all(axis=1)
            if not finite.all():
                raise InputError(f"latent: expected finite numbers in patches {ids[~finite]}")
            distortions.append(distortion)
            shifts.append(shift)
            patch_ids.append(ids)
            block_ids.append(blocks)
            if until and until(np.concatenate(distortions), np.concatenate(block_ids)):
                break
    finally:
        model.train(training)
    if not distortions:
        raise InputError("batches: expected at least one patch with every modality, found none")
    patch_distortion, clusters = np.concatenate(distortions), np.concatenate(block_ids)
    return ScenarioScores(
        scenarios=scenarios,
        distortion=patch_distortion.mean(axis=0),
        standard_error=clustered_standard_error(patch_distortion, clusters),
        patch_distortion=patch_distortion,
        latent_shift=np.sum(shifts, axis=0) / len(patch_distortion),
        patch_ids=np.concatenate(patch_ids),
        block_ids=clusters,
    )


def clustered_standard_error(
    values: NDArray[np.float64], clusters: NDArray[np.int64]
) -> NDArray[np.float64]:
    """Return the standard error of the mean when values within a cluster are dependent.

    Overlapping patches of one block observe the same pixels, so that the block is the independent
    unit. With G clusters, se^2 = G / (G - 1) * sum over clusters of (sum of residuals)^2 / N^2,
    which is the sandwich estimator of Liang and Zeger (1986) for a mean. It is the usual standard
    error when each value is a cluster of its own.

    Args:
        values: One row per observation, [N, K].
        clusters: Cluster of each observation, [N].

    Returns:
        Standard error of each column, float64 [K]; NaN for a single cluster.
    """
    labels, position = np.unique(clusters, return_inverse=True)
    if len(labels) < 2:
        return np.full(values.shape[1], np.nan)
    sums = np.zeros((len(labels), values.shape[1]))
    np.add.at(sums, position, values - values.mean(axis=0))
    correction = len(labels) / (len(labels) - 1)
    return np.sqrt(correction * np.square(sums).sum(axis=0)) / len(values)


def _complete_patches(
    batch: Batch | Tensor | Sequence[Tensor], position: int
) -> tuple[list[Tensor], NDArray[np.int64], NDArray[np.int64], int]:
    """Return images, identifiers and blocks of the complete patches, and the number of patches."""
    if not isinstance(batch, Batch):
        images = tuple(batch.unbind(dim=1) if isinstance(batch, Tensor) else batch)
        batch = Batch(images, torch.ones(len(images[0]), len(images), dtype=torch.bool))
    keep = batch.complete.cpu()
    images = tuple(image if bool(keep.all()) else image[keep] for image in batch.images)
    ids = np.arange(position, position + len(keep))
    if batch.patch_ids is not None:
        ids = batch.patch_ids.cpu().numpy().astype(np.int64)
    blocks = ids if batch.block_ids is None else batch.block_ids.cpu().numpy().astype(np.int64)
    return list(images), ids[keep.numpy()], blocks[keep.numpy()], len(keep)


def _latents(model: Any, images: list[Tensor], masks: Tensor) -> Tensor:
    """Return the latents of K scenarios, [K, B, C, ...]."""
    if hasattr(model, "scenario_latents"):
        return model.scenario_latents(images, masks)
    count = len(images[0])
    return torch.stack([model.latent(images, mask.expand(count, -1)) for mask in masks])


def _distortion(latents: Tensor, full: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return d_k(x), [B, K], and the sum over patches of their mean latent shift, [K, C].

    Differences of the latents [K, B, C, ...] are taken in their own precision and accumulated in
    float64, one scenario after the other, so that no float64 copy of all latents exists.
    """
    reference = latents[full]
    distortion, shift = [], []
    for latent in latents:
        difference = (latent - reference).double()
        difference = difference.reshape(*difference.shape[:2], -1)  # (B, C, positions)
        distortion.append(difference.square().mean(dim=(1, 2)))
        shift.append(difference.mean(dim=2).sum(dim=0))
    return torch.stack(distortion, dim=1).cpu().numpy(), torch.stack(shift).cpu().numpy()
