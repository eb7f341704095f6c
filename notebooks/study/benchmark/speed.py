"""Speed and memory of the networks: the published form against the form in use.

To score a patch, the plain form runs the whole network, decoder included, once with every modality
and once per scenario, one patch at a time; a training step is forward, loss, backward and Adam.
Both forms have the same weights and take turns in one process, so that whatever else slows the
machine down slows both. Results are ratios of medians.
"""

import resource
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import nn
from tqdm.auto import tqdm

from lsgs_core.distortion import SCENARIOS_AT_A_TIME, score_scenarios
from lsgs_core.models import Backbone, build_backbone
from lsgs_core.models.adapter import PredictionModel
from lsgs_core.models.cpu import accelerate_on_cpu
from lsgs_core.randomness import generator
from lsgs_core.regression import measured_scenarios
from lsgs_core.scenarios import ScenarioSet
from lsgs_core.uncertainty import stop_when_precise, stopping_error
from study.benchmark.published_form import as_published
from study.data.patches import PatchDataset
from study.stages.scoring import to_probabilities
from study.training.checkpoints import build_network, load_checkpoint

FORMS: dict[str, Callable[[Backbone], Backbone]] = {
    "plain": as_published,
    "ours": accelerate_on_cpu,
}
# The children of the backbones by the part that figures show; everything else is "other".
PARTS = {
    "encoders": ("encoders", "starts", "stages"),
    "transformers": (
        "tokenizers", "blocks", "between", "multimodal", "to_latent", "to_shared", "to_private",
    ),
    "fusion": ("fusions", "rectifications"),
    "decoder": ("decoder",),
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A network, the size of its input, and what is computed."""

    # or "prediction scoring" (D of the prediction, which needs decoders), "training"
    task: str = "scoring"
    backbone: str = "cbc_slp"
    preset: str = "paper"
    modalities: int = 3  # of three bands each
    size: int = 224  # height and width of a patch, pixels
    batch: int = 1  # patches at a time; the plain form scores them one by one
    budget: int = 0  # scenarios that ours measures, the others being predicted; 0 measures all


CASE = [field.name for field in fields(Case)]  # the columns of a case in tables


def growth(case: Case, most: int = 5, budget: int = 60) -> dict[str, list[Case]]:
    """Return cases with another number of modalities, patch size and batch, by that field.

    Of up to `most` modalities, those with more scenarios than the budget are there once more, with
    the budget.
    """
    half = max(32, case.size // 64 * 32)  # CMX halves a patch five times
    sizes = sorted({half, case.size, case.size + half})
    return {
        "modalities": [
            replace(case, modalities=count, budget=scenarios)
            for scenarios in (0, budget)
            for count in range(2, most + 1)
            if 2**count - 1 > scenarios
        ],
        "size": [replace(case, size=size) for size in sizes],
        "batch": [replace(case, batch=count) for count in (1, 2, 4)],
    }


class _Workload:
    """The network, random images and availability masks of a case, equal for equal cases."""

    def __init__(self, case: Case, device: str) -> None:
        torch.manual_seed(0)
        self.case = case
        bands = (3,) * case.modalities
        self.model = build_backbone(case.backbone, case.preset, bands).to(device)
        shape = case.batch, case.modalities, 3, case.size, case.size
        self.images = torch.randn(shape).to(device)
        names = [f"modality {index}" for index in range(case.modalities)]
        scenarios = ScenarioSet.of(names)
        self.masks = torch.tensor(scenarios.masks, device=device)  # (K, M), full last
        self.measured = self.masks[measured_scenarios(scenarios, case.budget)]

    def run(self, form: str, plain_forwards: int = 0) -> Callable[[], dict[str, float]]:
        """Return a function that runs a form with its own weights and returns seconds by part."""
        model = FORMS[form](self.model)
        if self.case.task == "training":
            model.train()
            optimiser = torch.optim.Adam(model.parameters(), 1e-4, fused=form == "ours")
            return lambda: self._train(model, optimiser)
        network: nn.Module = model.eval()
        passes: Sequence[Callable[[], object]]
        times, images = 1.0, self.images.unbind(1)
        if form == "plain":
            masks = [self.masks[-1], *self.masks]
            pairs = [(image[None], mask[None]) for image in self.images for mask in masks]
            passes = [partial(model.heads, *pair) for pair in pairs]
            passes = passes[: min(plain_forwards, len(masks)) or None]
            times = len(pairs) / len(passes)
        elif self.case.task == "prediction scoring":
            predicting = PredictionModel(model).for_scoring()
            network = predicting.model
            latents = partial(predicting.each_latent, images, self.measured)
            passes = [lambda: deque(latents(), maxlen=0)]  # one by one, as they are scored
        else:
            network = scoring = model.for_scoring()
            parts = self.measured.split(SCENARIOS_AT_A_TIME)
            passes = [partial(scoring.scenario_latents, self.images, part) for part in parts]
        return partial(_score, network, passes, times)

    def _train(self, model: Backbone, optimiser: torch.optim.Optimizer) -> dict[str, float]:
        device, count = self.images.device, self.case.modalities + 1
        target = torch.ones(len(self.images), 1, self.case.size, self.case.size, device=device)
        # Patches of a batch have different scenarios: none missing, the first one, the second, …
        available = self.masks[-1].repeat(len(self.images), 1)
        for index in range(len(self.images)):
            if index % count:
                available[index, index % count - 1] = False
        with _timed(model) as seconds:
            logits = model(self.images, available)
            loss = F.binary_cross_entropy_with_logits(logits, target)
        start = _now(device)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        middle = _now(device)
        optimiser.step()
        return seconds | {"backward": middle - start, "optimiser": _now(device) - middle}


@torch.inference_mode()
def _score(
    model: nn.Module, passes: Sequence[Callable[[], object]], times: float
) -> dict[str, float]:
    """Run forward passes, and return `times` their seconds, by part."""
    with _timed(model) as seconds:
        for forward in passes:
            forward()
    return {part: value * times for part, value in seconds.items()}


def compare(
    cases: Sequence[Case], repeats: int, device: str = "cpu", plain_forwards: int = 0
) -> pd.DataFrame:
    """Time both forms in turns, `repeats` times after a run that is not counted.

    Of the equal forward passes of the plain scoring, `plain_forwards` are timed on the first patch,
    and extrapolated; 0 times all. Returns one row per case, form, repeat and part, with `seconds`
    per patch.
    """
    rows = []
    total = len(cases) * (repeats + 1) * len(FORMS)
    with tqdm(total=total, unit="run", desc="timing") as bar:
        for case in cases:
            workload = _Workload(case, device)
            runs = {form: workload.run(form, plain_forwards) for form in FORMS}
            for repeat in range(-1, repeats):
                for form, run in runs.items():
                    bar.set_postfix_str(f"{case.backbone} {case.task} {form}")
                    seconds = run()
                    labels = {**asdict(case), "form": form, "repeat": repeat}
                    rows += [{**labels, "part": part, "seconds": value / case.batch}
                             for part, value in seconds.items() if repeat >= 0]  # fmt: skip
                    bar.update()
    return pd.DataFrame(rows)


def ratios(timings: pd.DataFrame) -> pd.DataFrame:
    """Return the median seconds per patch of both forms of `compare`, and plain divided by ours."""
    runs = timings.groupby([*CASE, "form", "repeat"], sort=False, as_index=False)["seconds"].sum()
    table = runs.pivot_table("seconds", CASE, "form", aggfunc="median", sort=False)[list(FORMS)]
    table = table.reset_index().rename_axis(columns=None)
    return table.assign(ratio=table["plain"] / table["ours"])


def stopped_passes(
    patch_distortion: NDArray[np.float64], tolerance: float, patches: int, orders: int
) -> pd.DataFrame:
    """Stop passes over many patches, in repeated random orders, when p is known.

    Args:
        patch_distortion: d_k(x) of a trained network, [N, K].
        tolerance: Standard error of p at which a pass stops.
        patches: Number of patches of the pass; more than N are drawn from the N with replacement.
        orders: Number of passes.

    Returns:
        One row per pass: the patches that were `needed`, the share of p that lies within two stated
        errors of the whole pass's (`covered`), and the largest `difference` from it.
    """
    rows, scored, known = [], len(patch_distortion), to_probabilities({})
    for order in tqdm(range(orders), desc="stopped passes", unit="pass"):
        chosen = generator("order", order).choice(scored, patches, replace=patches > scored)
        values = patch_distortion[chosen]
        enough = stop_when_precise(tolerance, known, patches)
        counts = (*range(8, patches, 8), patches)
        count = next((n for n in counts if enough(values[:n], chosen[:n])), patches)
        error = stopping_error(values[:count], known, patches)
        whole, stopped = (known(part.mean(axis=0)) for part in (values, values[:count]))
        difference = np.abs(stopped - whole)
        covered = float((difference <= 2 * error + 1e-12).mean())
        rows.append({"needed": count, "covered": covered, "difference": difference.max()})
    return pd.DataFrame(rows)


def time_to_probabilities(
    table: pd.DataFrame,
    patch_distortion: Mapping[str, NDArray[np.float64]],
    patches: int,
    orders: int,
    tolerances: Sequence[float] = (0.01, 0.005),
) -> pd.DataFrame:
    """Return the hours until p is there, whole passes and stopped ones, by backbone.

    Seconds are of a table of `ratios`, d_k(x) [N, K] of a trained network of each backbone.
    """
    rows = []
    for _, case in table[table["task"] == "scoring"].iterrows():
        backbone = case["backbone"]
        hours = {name: case[name] * patches / 3600 for name in FORMS}
        row = {"backbone": backbone, "published, hours": hours["plain"], "ours": hours["ours"]}
        for tolerance in tolerances:
            passes = stopped_passes(patch_distortion[backbone], tolerance, patches, orders)
            needed = passes["needed"].mean()
            row |= {f"patches to ±{tolerance}": needed,
                    f"ours to ±{tolerance}": needed * case["ours"] / 3600,
                    f"covered at ±{tolerance}": passes["covered"].mean()}  # fmt: skip
        rows.append(row)
    return pd.DataFrame(rows)


@torch.inference_mode()
def distortion_error(case: Case, device: str = "cpu") -> float:
    """Return the largest relative difference of D between both forms."""
    workload = _Workload(case, device)
    images, masks = workload.images, workload.masks
    plain = FORMS["plain"](workload.model).eval()
    plain_latents = torch.stack([plain.latent(images, m.expand(len(images), -1)) for m in masks])
    ours = FORMS["ours"](workload.model).for_scoring().scenario_latents(images, masks)
    expected, found = (
        (latents - latents[-1]).double().square().flatten(1).mean(dim=1)[:-1]
        for latents in (plain_latents, ours)
    )
    return float(((found - expected).abs() / expected).max())


def in_bfloat16(
    backbone: str, dataset: PatchDataset, weights: Path, device: str, batch_size: int = 8
) -> dict[str, Any]:
    """Score patches with a trained network of the demo preset in float32, and in mixed bfloat16.

    Returns:
        The backbone, seconds per patch of both, and what bfloat16 changes: the largest relative
        difference of D (`error of D`) and the largest difference of p (`error of p`).
    """
    model = build_network(backbone, "demo", dataset, device)
    load_checkpoint(model, weights)
    row: dict[str, Any] = {"backbone": backbone}
    scenarios, distortions = ScenarioSet.of(dataset.modalities), []
    batches = list(dataset.batches(batch_size))
    for name, mixed in {"float32": False, "bfloat16": True}.items():
        with torch.autocast(device.partition(":")[0], torch.bfloat16, enabled=mixed):
            score_scenarios(model, batches[:1], scenarios, progress=False)  # not counted
            start = time.perf_counter()
            distortions.append(score_scenarios(model, batches, scenarios).distortion)
            row[f"{name}, seconds"] = (time.perf_counter() - start) / len(dataset)
    exact, coarse = distortions
    p, q = map(to_probabilities({}), distortions)
    return row | {"error of D": np.abs(coarse[:-1] / exact[:-1] - 1).max(),
                  "error of p": np.abs(q - p).max()}  # fmt: skip


def peak_memory(cases: Sequence[Case], threads: int, device: str = "cpu") -> pd.DataFrame:
    """Measure the largest memory of two runs, each in a fresh process.

    It is the resident memory of the process, or on a GPU what PyTorch took of the GPU's memory.

    Returns the cases with the columns `plain` and `ours`, GB (10^9 bytes), and their `ratio`.
    """
    rows = [asdict(case) for case in cases]
    # A process that is spawned would start with the peak of this one.
    context = get_context("forkserver")
    jobs = [(row, case, form) for row, case in zip(rows, cases, strict=True) for form in FORMS]
    with ProcessPoolExecutor(1, context, max_tasks_per_child=1) as processes:
        for row, case, form in tqdm(jobs, unit="process", desc="memory"):
            row[form] = processes.submit(_peak_of_runs, case, form, threads, device).result()
    table = pd.DataFrame(rows)
    return table.assign(ratio=table["ours"] / table["plain"])


def loader_rates(dataset: PatchDataset, batch_size: int) -> list[float]:
    """Return the patches per second of three passes over a data set; the first one is cold."""
    rates = []
    for _ in range(3):
        start = time.perf_counter()
        count = sum(len(batch.available) for batch in dataset.batches(batch_size))
        rates.append(count / (time.perf_counter() - start))
    return rates


@contextmanager
def _timed(model: nn.Module) -> Iterator[dict[str, float]]:
    """Yield the seconds by part, which are complete when the block ends."""
    device = next(model.parameters()).device
    seconds = dict.fromkeys((*PARTS, "other"), 0.0)
    starts: dict[nn.Module, float] = {}
    part_of = {
        module: part
        for part, names in PARTS.items()
        for name, child in model.named_children()
        if name in names
        for module in _called(child)
    }

    def before(module: nn.Module, _: object) -> None:
        starts[module] = _now(device)

    def after(module: nn.Module, _: object, __: object) -> None:
        seconds[part_of[module]] += _now(device) - starts.pop(module)

    handles = [module.register_forward_pre_hook(before) for module in part_of]
    handles += [module.register_forward_hook(after) for module in part_of]
    begin = _now(device)
    try:
        yield seconds
    finally:
        seconds["other"] = _now(device) - begin - sum(seconds.values())
        for handle in handles:
            handle.remove()


def _called(module: nn.Module) -> list[nn.Module]:
    """Return the modules that are called: those inside lists and dictionaries of modules."""
    if not isinstance(module, nn.ModuleList | nn.ModuleDict):
        return [module]
    return [called for child in module.children() for called in _called(child)]


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _peak_of_runs(case: Case, form: str, threads: int, device: str) -> float:
    """Run a case twice in this process, and return its peak memory in GB."""
    torch.set_num_threads(threads)
    run = _Workload(case, device).run(form)
    for _ in range(2):  # the second with the optimiser's state
        run()
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_reserved(device) / 1e9
    unit = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9
