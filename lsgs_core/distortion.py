"""Distortion: how far each scenario moves the shared latent of a pretrained network.

With z(x, k) the latent of patch x under scenario k, d_k(x) is the mean over all elements of
(z(x, k) - z(x, full))^2, and D_k is the mean of d_k over the training patches (arXiv 2605.20372,
scenario scoring). The network is in evaluation mode, so that D of the full scenario is 0.
"""

from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from threading import Lock
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from tqdm.auto import tqdm

from lsgs_core.batch import Batch
from lsgs_core.errors import Floats, InputError, array_of, check_shape, check_type, real_numbers
from lsgs_core.regression import measured_scenarios, regress_scenarios
from lsgs_core.scenarios import ScenarioSet

# Number of scenarios whose latents a backbone computes at a time: memory does not grow with K.
SCENARIOS_AT_A_TIME = 32
_in_use: set[nn.Module] = set()  # modules that a thread is scoring
_lock = Lock()  # guards `_in_use`


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
        patch_ids: Identifiers of the patches, int64 [N]; where batches carry none, their position
            among all patches, skipped ones included.
        block_ids: Spatial block of each patch, int64 [N]; `patch_ids` where batches carry none.
        predictive_error: Standard deviation of D where it is predicted from the measured scenarios,
            float64 [K]; 0 where it was measured. Predicted d_k(x) can be negative, D is not.
    """

    scenarios: ScenarioSet
    distortion: Floats
    standard_error: Floats
    patch_distortion: Floats
    latent_shift: Floats
    patch_ids: NDArray[np.int64]
    block_ids: NDArray[np.int64]
    predictive_error: Floats


@dataclass(frozen=True)
class BatchScores:
    """The scores of one batch with B complete patches, for the K scenarios that are measured."""

    distortion: Floats  # d_k(x), [B, K]
    shift: Floats  # sum over the patches of their mean latent shift, [K, C]
    patch_ids: NDArray[np.int64]  # [B]
    block_ids: NDArray[np.int64]  # [B]

    def __post_init__(self) -> None:
        count = len(array_of("patch_ids", self.patch_ids, "iu", [None]))
        array_of("block_ids", self.block_ids, "iu", [count])
        measured = real_numbers("distortion", self.distortion, [count, None]).shape[1]
        real_numbers("latent shift", self.shift, [measured, None])


def score_scenarios(
    model: nn.Module,
    batches: Iterable[Batch | Tensor | Sequence[Tensor]],
    scenarios: ScenarioSet,
    device: torch.device | str | None = None,
    until: Callable[[Floats, NDArray[np.int64]], bool] | None = None,
    progress: bool = True,
    scenario_budget: int = 0,
) -> ScenarioScores:
    """Measure the distortion of every scenario.

    The model needs a method `latent(images, available)`. More are used where a model has them:
    `scenario_latents(images, masks)`, by which a backbone shares work between scenarios, or
    `each_latent(images, masks)`, which yields large latents one by one, and `for_scoring()`, which
    returns a faster copy. No decoder runs, except for a `PredictionModel`. The network is scored in
    evaluation mode; afterwards, also after an error, each module has its former mode again.

    Args:
        model: A backbone, or any module with the methods above.
        batches: `Batch` objects, or images alone: M tensors [B, D_m, H, W] or one [B, M, D, H, W].
            A patch is skipped where a modality is not available or observes fewer pixels than
            another, because distortion is measured against the full scenario.
        scenarios: The scenarios, with modalities in the order of the images.
        device: Device of the images, that of the model's parameters; None takes the latter.
        until: Stopping rule, such as `uncertainty.stop_when_precise`, called after each batch with
            d_k(x) [N, K] and the block ids [N] of all patches so far; True ends the scoring.
            Patches must then come in random order.
        progress: True shows a progress bar over the batches.
        scenario_budget: Measure so many scenarios, and predict the others by
            `regression.regress_scenarios`; 0 measures all.

    Raises:
        InputError: No patch is complete, batches or latents have another form, a latent is not
            finite (the message names the patches), the budget is too small, or another thread is
            scoring the network.
    """
    check_type("until", until, Callable, type(None))
    parts: list[BatchScores] = []
    batch_scores = score_batches(model, batches, scenarios, device, progress, scenario_budget)
    with closing(batch_scores) as scored:
        for part in scored:
            parts.append(part)
            if until:
                so_far = joined_scores(parts, scenarios, scenario_budget)
                if until(so_far.patch_distortion, so_far.block_ids):
                    break
    return joined_scores(parts, scenarios, scenario_budget)


def score_batches(
    model: nn.Module,
    batches: Iterable[Batch | Tensor | Sequence[Tensor]],
    scenarios: ScenarioSet,
    device: torch.device | str | None = None,
    progress: bool = True,
    scenario_budget: int = 0,
) -> Generator[BatchScores, None, None]:
    """Yield the scores of each batch with a complete patch, for callers that share batches out.

    Arguments and errors are those of `score_scenarios`.
    """
    check_type("model", model, nn.Module)
    if not (hasattr(model, "latent") or hasattr(model, "scenario_latents")):
        expected = "a method `latent`; see `HookedModel`, or take `.module` of a parallel network"
        raise InputError(f"model: expected {expected}")
    check_type("scenarios", scenarios, ScenarioSet)
    check_type("progress", progress, bool)
    single = isinstance(batches, Tensor | Batch | np.ndarray | Mapping)
    if single or not hasattr(batches, "__iter__"):
        raise InputError(f"batches: expected a list of batches, found {type(batches).__name__}")
    tensors = [*model.parameters(), *model.buffers()]
    dtypes = {tensor.dtype for tensor in tensors if tensor.is_floating_point()}
    devices = [tensor.device for tensor in tensors] or [torch.device("cpu")]
    fitting = [own for own in devices if device is None or str(device) in (str(own), own.type)]
    if not fitting:
        expected = f"{sorted({*map(str, devices)})}, as the model has"
        raise InputError.of("device", expected, device)
    target = fitting[0]
    measured = measured_scenarios(scenarios, scenario_budget)
    masks = torch.tensor(scenarios.masks[measured], device=target)
    position = 0  # of the first patch of a batch
    with _evaluation_mode(model) as scored:
        for item in tqdm(batches, desc="scoring", unit="batch", disable=not progress):
            batch = _checked(item, masks.shape[1], dtypes)
            images, ids, blocks = _complete_patches(batch, position)
            position += len(batch.images[0])
            if not len(ids):
                continue
            # Not inference mode: what a network caches meanwhile must still serve training.
            with torch.no_grad():  # not around the yield, where it would reach the caller
                distortion, shift = _distortion(scored, [x.to(target) for x in images], masks)
            finite = np.isfinite(distortion).all(axis=1)
            if not finite.all():
                raise InputError(f"latent: expected finite numbers in patches {ids[~finite]}")
            yield BatchScores(distortion, shift, ids, blocks)


def joined_scores(
    parts: Sequence[BatchScores], scenarios: ScenarioSet, scenario_budget: int = 0
) -> ScenarioScores:
    """Return the scores of all batches, in their order.

    Scenarios that the budget left out are predicted; the prediction is linear, so that it holds for
    D, for the d_k(x) and for the latent shift alike.

    Raises:
        InputError: No batch had a complete patch, or the latents of batches differ in channels.
    """
    measured = measured_scenarios(scenarios, scenario_budget)
    check_type("batches", parts, Sequence)
    for part in parts:
        check_type("batches", part, BatchScores)
    if not parts:
        raise InputError("batches: expected at least one patch with every modality, found none")
    for part in parts:
        check_shape("latent shift", part.shift, [len(measured), parts[0].shift.shape[1]])
    patch_distortion = np.concatenate([part.distortion for part in parts])
    block_ids = np.concatenate([part.block_ids for part in parts])
    latent_shift = np.sum([part.shift for part in parts], axis=0) / len(patch_distortion)
    predictive_error = np.zeros(len(scenarios))
    if len(measured) < len(scenarios):
        regression = regress_scenarios(scenarios.masks, measured, patch_distortion.mean(axis=0))
        patch_distortion = patch_distortion @ regression.weights.T
        latent_shift = regression.weights @ latent_shift
        predictive_error = regression.error
    return ScenarioScores(
        scenarios=scenarios,
        distortion=np.maximum(patch_distortion.mean(axis=0), 0.0),
        standard_error=clustered_standard_error(patch_distortion, block_ids),
        patch_distortion=patch_distortion,
        latent_shift=latent_shift,
        patch_ids=np.concatenate([part.patch_ids for part in parts]),
        block_ids=block_ids,
        predictive_error=predictive_error,
    )


def clustered_standard_error(values: Floats, clusters: NDArray[np.int64]) -> Floats:
    """Return the standard error of the mean of values [N, K] that depend within a cluster, [K].

    Overlapping patches of one block observe the same pixels, so that the block is the independent
    unit. With G clusters, se^2 = G / (G - 1) * sum over clusters of (sum of residuals)^2 / N^2,
    which is the sandwich estimator of Liang and Zeger (1986) for a mean. It is the usual standard
    error when each value is a cluster of its own, and NaN for a single cluster.
    """
    values = real_numbers("values", values, [None, None])
    clusters = array_of("clusters", clusters, "iu", [len(values)])
    labels, position = np.unique(clusters, return_inverse=True)
    if len(labels) < 2:
        return np.full(values.shape[1], np.nan)
    sums = np.zeros((len(labels), values.shape[1]))
    np.add.at(sums, position, values - values.mean(axis=0))
    correction = len(labels) / (len(labels) - 1)
    return np.sqrt(correction * np.square(sums).sum(axis=0)) / len(values)


@contextmanager
def _evaluation_mode(model: Any) -> Iterator[Any]:
    """Give the network, or its copy for scoring, in evaluation mode, and restore all modes.

    Another thread that is scoring a network that shares a module with this one is an `InputError`.
    """
    scored = model.for_scoring() if hasattr(model, "for_scoring") else model
    with _lock:
        modes = {module: module.training for module in scored.modules()}
        if not _in_use.isdisjoint(modes):
            raise InputError("model: expected a network that no other thread scores; score a copy")
        _in_use.update(modes)
    try:
        scored.eval()
        yield scored
    finally:
        for module, training in modes.items():
            module.training = training
        with _lock:
            _in_use.difference_update(modes)


def _checked(item: Any, count: int, dtypes: set[torch.dtype]) -> Batch:
    """Return an item of `batches` as a batch of `count` modalities in one of the model's dtypes."""
    images: Any = item.images if isinstance(item, Batch) else item
    if isinstance(images, Tensor) and images.ndim == 5:
        images = images.unbind(dim=1)
    right = isinstance(images, list | tuple) and len(images) == count
    right = right and all(isinstance(image, Tensor) and image.ndim == 4 for image in images)
    right = right and len({len(image) for image in images}) == 1
    right = right and all(image.is_floating_point() for image in images)
    if not right or (dtypes and not {image.dtype for image in images} <= dtypes):
        names = " or ".join(sorted(map(str, dtypes))) or "a floating dtype"
        forms = f"{count} tensors [B, D_m, H, W] or one [B, {count}, D, H, W] of {names} in each"
        raise InputError(f"batches: expected {forms}, found {_form(images)}")
    if isinstance(item, Batch):
        return item
    return Batch(tuple(images), torch.ones(len(images[0]), count, dtype=torch.bool))


def _form(value: Any) -> str:
    """Return type, dtype and shape of a value for a message."""
    if isinstance(value, Tensor):
        return f"{value.dtype} {list(value.shape)}"
    if isinstance(value, list | tuple):
        return f"a {type(value).__name__} of {', '.join(map(_form, value[:4]))}"
    return f"a {type(value).__name__}"


def _complete_patches(
    batch: Batch, position: int
) -> tuple[list[Tensor], NDArray[np.int64], NDArray[np.int64]]:
    """Return images, identifiers and blocks of the complete patches."""
    keep = batch.complete.cpu()
    images = [image if bool(keep.all()) else image[keep] for image in batch.images]
    numbers = torch.arange(position, position + len(keep))
    ids = numbers if batch.patch_ids is None else batch.patch_ids.cpu().long()
    blocks = ids if batch.block_ids is None else batch.block_ids.cpu().long()
    return images, ids[keep].numpy(), blocks[keep].numpy()


def _latents(model: Any, images: list[Tensor], masks: Tensor) -> Iterator[Tensor]:
    """Yield the latents [B, C, ...] of all scenarios from the last, which is the full one."""
    for part in reversed(masks.split(SCENARIOS_AT_A_TIME)):
        if hasattr(model, "each_latent"):
            yield from model.each_latent(images, part.flip(0))
        elif hasattr(model, "scenario_latents"):
            yield from reversed(model.scenario_latents(images, part).unbind())
        else:
            for mask in reversed(part.unbind()):
                yield model.latent(images, mask.expand(len(images[0]), -1))


def _distortion(model: Any, images: list[Tensor], masks: Tensor) -> tuple[Floats, Floats]:
    """Return d_k(x), [B, K], and the sum over patches of their mean latent shift, [K, C].

    Differences are taken in the latent's own precision and accumulated in float64 (float32 on
    `mps`), one scenario after the other, so that no float64 copy of all latents exists.
    """
    batch, count = len(images[0]), len(masks)
    wide = torch.float32 if images[0].device.type == "mps" else torch.float64  # it has no float64
    # Filled in place: a small array that is kept for each large one that is freed would fragment
    # the memory, which then grows as if all latents were kept.
    distortion, shift = np.empty((batch, count)), np.empty((count, 0))
    reference = None
    for k, latent in zip(reversed(range(count)), _latents(model, images, masks), strict=True):
        shape = latent.shape if isinstance(latent, Tensor) else ()
        right = len(shape) > 1 and shape[0] == batch and latent.is_floating_point()
        if not right or not latent.numel() or shape != getattr(reference, "shape", shape):
            expected = f"a floating tensor [{batch}, C, ...] of the same shape in all scenarios"
            raise InputError(f"latent: expected {expected}, found {_form(latent)}")
        if reference is None:
            reference, shift = latent, np.empty((count, latent.shape[1]))
        difference = (latent - reference).to(wide)
        difference = difference.reshape(*difference.shape[:2], -1)  # (B, C, positions)
        distortion[:, k] = difference.square().mean(dim=(1, 2)).cpu()
        shift[k] = difference.mean(dim=2).sum(dim=0).cpu()
    return distortion, shift
