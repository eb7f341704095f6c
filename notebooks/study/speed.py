"""Speed and memory of the networks: the published form against the form in use.

To score a patch, the plain form runs the whole network, decoder included, once with every modality
and once per scenario, one patch at a time; a training step is forward, loss, backward and Adam.
Both forms have the same weights and take turns in one process, so that whatever else slows the
machine down slows both. Results are ratios of medians.
"""

import re
import resource
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from multiprocessing import get_context
from pathlib import Path

import pandas as pd
import torch
import torch.nn.functional as F
from torch import nn
from tqdm.auto import tqdm

from lsgs_core.models import Backbone, build_backbone
from lsgs_core.models.cpu import accelerate_on_cpu
from lsgs_core.scenarios import ScenarioSet
from study.data.patches import PatchDataset
from study.published_form import as_published

Form = Callable[[Backbone], Backbone]
FORMS: dict[str, Form] = {"plain": as_published, "ours": accelerate_on_cpu}
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
    """A network, the size of its input, and what is computed.

    Attributes:
        task: "scoring" or "training".
        backbone: Name of a backbone.
        preset: Size of the backbone.
        modalities: Number of modalities, of three bands each.
        size: Height and width of a patch, pixels.
        batch: Patches at a time; the plain form scores them one by one.
    """

    task: str = "scoring"
    backbone: str = "cbc_slp"
    preset: str = "paper"
    modalities: int = 3
    size: int = 224
    batch: int = 1


CASE = [field.name for field in fields(Case)]  # the columns of a case in tables


def growth(case: Case) -> dict[str, list[Case]]:
    """Return cases with another number of modalities, patch size and batch, by that field."""
    half = max(32, case.size // 64 * 32)  # CMX halves a patch five times
    sizes = sorted({half, case.size, case.size + half})
    return {
        "modalities": [replace(case, modalities=count) for count in range(2, 6)],
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
        self.masks = torch.tensor(ScenarioSet.of(names).masks, device=device)  # (K, M), full last

    def run(self, form: str, plain_forwards: int = 0) -> Callable[[], dict[str, float]]:
        """Return a function that runs a form with its own weights and returns seconds by part."""
        model = FORMS[form](self.model)
        if self.case.task == "training":
            model.train()
            optimiser = torch.optim.Adam(model.parameters(), 1e-4, fused=form == "ours")
            return lambda: self._train(model, optimiser)
        model.eval()
        if form == "plain":
            return lambda: self._score_plainly(model, plain_forwards)
        scored = model.for_scoring()
        return lambda: self._score(scored)

    @torch.inference_mode()
    def _score_plainly(self, model: Backbone, forwards: int) -> dict[str, float]:
        masks = [self.masks[-1], *self.masks]
        passes = [(image[None], mask[None]) for image in self.images for mask in masks]
        timed = passes[: min(forwards, len(self.masks) + 1) or None]
        with _timed(model) as seconds:
            for image, mask in timed:
                model.heads(image, mask)
        return {part: value * len(passes) / len(timed) for part, value in seconds.items()}

    @torch.inference_mode()
    def _score(self, model: Backbone) -> dict[str, float]:
        with _timed(model) as seconds:
            model.scenario_latents(self.images, self.masks)
        return seconds

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


def compare(
    cases: Sequence[Case],
    repeats: int,
    device: str = "cpu",
    plain_forwards: int = 0,
) -> pd.DataFrame:
    """Time both forms in turns.

    Args:
        cases: What is timed.
        repeats: Number of timed runs of each form, after one that is not counted.
        device: Where to compute.
        plain_forwards: Time only so many of the equal forward passes of the plain scoring, on the
            first patch, and extrapolate; 0 times all.

    Returns:
        One row per case, form, repeat and part, with `seconds` per patch.
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
    """Return the median seconds per patch of both forms in a table of `compare`, and their ratio.

    The ratio is plain divided by ours.
    """
    runs = timings.groupby([*CASE, "form", "repeat"], sort=False, as_index=False)["seconds"].sum()
    table = runs.pivot_table("seconds", CASE, "form", aggfunc="median", sort=False)[list(FORMS)]
    table = table.reset_index().rename_axis(columns=None)
    return table.assign(ratio=table["plain"] / table["ours"])


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


def peak_memory(cases: Sequence[Case], threads: int) -> pd.DataFrame:
    """Measure the largest resident memory of two runs, each in a fresh process on the CPU.

    Returns:
        The cases with the columns `plain` and `ours`, GB (10^9 bytes), and their `ratio`, ours
        divided by plain.
    """
    rows = [asdict(case) for case in cases]
    jobs = [(row, case, form) for row, case in zip(rows, cases, strict=True) for form in FORMS]
    with ProcessPoolExecutor(1, get_context("spawn"), max_tasks_per_child=1) as processes:
        for row, case, form in tqdm(jobs, unit="process", desc="memory"):
            row[form] = processes.submit(_peak_of_runs, case, form, threads).result()
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


def _peak_of_runs(case: Case, form: str, threads: int) -> float:
    """Run a case twice in this process, and return its peak memory in GB."""
    torch.set_num_threads(threads)
    run = _Workload(case, "cpu").run(form)
    for _ in range(2):  # the second with the optimiser's state
        run()
    return _peak_resident() / 1e9


def _peak_resident() -> int:
    """Return the largest resident memory of this process so far, in bytes."""
    status = Path("/proc/self/status")
    if status.is_file():  # getrusage would include the process that started this one
        [peak] = re.findall(r"VmHWM:\s+(\d+) kB", status.read_text())
        return int(peak) * 1024
    unit = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
