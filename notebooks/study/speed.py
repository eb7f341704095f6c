"""Speed and memory: this project's form of the networks against the plain one, side by side.

The plain form is the published procedure. To score a patch it runs the whole network, decoder
included, once with every modality and once per scenario, one patch at a time; a training step is
forward, loss, backward and Adam. Both forms have the same weights and take turns in one process, so
that whatever else slows the machine down slows both. What is reported are ratios of medians.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm.auto import tqdm

from lsgs_core.models import Backbone, build_backbone
from lsgs_core.models.cpu import accelerate_on_cpu
from lsgs_core.scenarios import ScenarioSet
from study.data.patches import PatchDataset
from study.published_form import as_published

# The published form of a network, and ours.
FORMS: dict[str, Callable[[Backbone], Backbone]] = {
    "plain": as_published,
    "ours": accelerate_on_cpu,
}
# What the modules of the backbones belong to in the figures; the rest is "other".
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
    """What is run.

    Attributes:
        task: "scoring" or "training".
        backbone: Name of a backbone.
        preset: Its size.
        modalities: Number of modalities, of three bands each.
        size: Height and width of a patch, pixels.
        batch: Patches at a time; the plain scoring takes them one by one.
    """

    task: str = "scoring"
    backbone: str = "cbc_slp"
    preset: str = "paper"
    modalities: int = 3
    size: int = 224
    batch: int = 1


def growth(case: Case) -> dict[str, list[Case]]:
    """The cases that show how time grows with modalities, patch size and batch, by that field."""
    half = max(32, case.size // 64 * 32)  # CMX halves a patch five times
    sizes = sorted({half, case.size, case.size + half})
    return {
        "modalities": [replace(case, modalities=count) for count in range(2, 6)],
        "size": [replace(case, size=size) for size in sizes],
        "batch": [replace(case, batch=count) for count in (1, 2, 4)],
    }


@dataclass(frozen=True)
class _Workload:
    """The network and random images of a case; equal cases have equal ones."""

    case: Case
    model: Backbone
    images: Tensor  # (B, M, 3, H, W)
    masks: Tensor  # (K, M), the full scenario last
    forwards: int  # of the plain scoring, at most so many; 0 for all

    @classmethod
    def of(cls, case: Case, device: str, forwards: int = 0) -> _Workload:
        torch.manual_seed(0)
        model = build_backbone(case.backbone, case.preset, bands=(3,) * case.modalities).to(device)
        images = torch.randn(case.batch, case.modalities, 3, case.size, case.size)
        scenarios = ScenarioSet.of([f"modality {index}" for index in range(case.modalities)])
        masks = torch.tensor(scenarios.masks, device=device)
        return cls(case, model, images.to(device), masks, forwards)

    def run(self, form: str) -> Callable[[], dict[str, float]]:
        """One run of a form, with its own copy of the network, as seconds of every part."""
        model = FORMS[form](self.model)
        if self.case.task == "scoring":
            model.eval()
            if form == "plain":
                return partial(self._score_plainly, model)
            return partial(self._score, model.for_scoring())
        model.train()
        adam = torch.optim.Adam(model.parameters(), 1e-4, fused=form == "ours")
        return partial(self._step, model, adam)

    def published_distortion(self) -> Tensor:
        """D [K] of the published form, scenario by scenario from `latent`."""
        model = FORMS["plain"](self.model).eval()
        batch = len(self.images)
        with torch.inference_mode():
            latents = [model.latent(self.images, mask.expand(batch, -1)) for mask in self.masks]
        return _distortion(torch.stack(latents))

    def distortion(self) -> Tensor:
        """D [K] as scoring computes it."""
        scored = FORMS["ours"](self.model).for_scoring()
        with torch.inference_mode():
            return _distortion(scored.scenario_latents(self.images, self.masks))

    def _score_plainly(self, model: Backbone) -> dict[str, float]:
        wanted = [self.masks[-1], *self.masks]
        chosen = wanted[: self.forwards] if self.forwards else wanted
        images = self.images[:1] if self.forwards else self.images
        with torch.inference_mode(), _timed(model) as seconds:
            for image in images:
                for mask in chosen:
                    model.heads(image[None], mask[None])
        repeats = len(wanted) * len(self.images) / (len(chosen) * len(images))
        return {part: value * repeats for part, value in seconds.items()}

    def _score(self, model: Backbone) -> dict[str, float]:
        with torch.inference_mode(), _timed(model) as seconds:
            model.scenario_latents(self.images, self.masks)
        return seconds

    def _step(self, model: Backbone, optimiser: torch.optim.Optimizer) -> dict[str, float]:
        shape = len(self.images), 1, self.case.size, self.case.size
        target = torch.ones(shape, device=self.images.device)
        # Patches of a batch have different scenarios: none missing, the first one, the second, …
        available = self.masks[-1].repeat(len(self.images), 1)
        for index in range(len(self.images)):
            if index % (self.case.modalities + 1):
                available[index, index % (self.case.modalities + 1) - 1] = False
        with _timed(model) as seconds:
            logits = model(self.images, available)
            loss = F.binary_cross_entropy_with_logits(logits, target)
        started = _now(self.images.device)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        behind = _now(self.images.device)
        optimiser.step()
        seconds |= {"backward": behind - started, "optimiser": _now(self.images.device) - behind}
        return seconds


def compare(
    cases: Sequence[Case],
    repeats: int,
    device: str = "cpu",
    plain_forwards: int = 0,
    progress: bool = True,
) -> pd.DataFrame:
    """Time both forms in turns.

    Args:
        cases: What to run.
        repeats: Timed runs of each form, after one that is not counted.
        device: Where.
        plain_forwards: Time only so many of the plain scoring's equal forward passes, of the first
            patch, and multiply; 0 runs them all.
        progress: Show a progress bar over the runs.

    Returns:
        One row per case, form, repeat and part, with `seconds` per patch.
    """
    rows = []
    total = len(cases) * (repeats + 1) * len(FORMS)
    with tqdm(total=total, unit="run", desc="timing", disable=not progress) as bar:
        for case in cases:
            workload = _Workload.of(case, device, plain_forwards)
            runs = {form: workload.run(form) for form in FORMS}
            for repeat in range(-1, repeats):
                for form, run in runs.items():
                    bar.set_postfix_str(f"{case.backbone} {case.task} {form}")
                    seconds = run()
                    if repeat >= 0:
                        rows += [
                            {**asdict(case), "form": form, "repeat": repeat, "part": part,
                             "seconds": value / case.batch}
                            for part, value in seconds.items()
                        ]  # fmt: skip
                    bar.update()
    return pd.DataFrame(rows)


def ratios(timings: pd.DataFrame) -> pd.DataFrame:
    """Median seconds per patch of both forms, and how many times ours goes into the plain one.

    Args:
        timings: Of `compare`.
    """
    case = list(Case.__dataclass_fields__)
    runs = timings.groupby([*case, "form", "repeat"], sort=False, as_index=False)["seconds"].sum()
    table = runs.pivot_table("seconds", case, "form", aggfunc="median", sort=False)[list(FORMS)]
    table = table.reset_index().rename_axis(columns=None)
    return table.assign(ratio=table["plain"] / table["ours"])


def distortion_error(case: Case, device: str = "cpu") -> float:
    """Largest relative difference of D between the plain form and ours."""
    workload = _Workload.of(case, device)
    expected, found = workload.published_distortion(), workload.distortion()
    return float(((found - expected).abs()[:-1] / expected[:-1]).max())


def peak_memory(cases: Sequence[Case], threads: int, progress: bool = True) -> pd.DataFrame:
    """Largest resident memory of two runs, each in a fresh process on the CPU.

    Args:
        cases: What to run.
        threads: CPU threads.
        progress: Show a progress bar over the processes.

    Returns:
        The cases with columns `plain` and `ours`, GB (10^9 bytes), and their `ratio`, ours through
        plain.
    """
    rows = []
    with tqdm(
        total=len(FORMS) * len(cases), unit="process", desc="memory", disable=not progress
    ) as bar:
        for case in cases:
            row = asdict(case)
            for form in FORMS:
                task = json.dumps({"case": asdict(case), "form": form, "threads": threads})
                command = [sys.executable, "-m", "study.speed", task]
                done = subprocess.run(command, check=True, capture_output=True, text=True)
                row[form] = float(done.stdout)
                bar.update()
            rows.append(row)
    table = pd.DataFrame(rows)
    return table.assign(ratio=table["ours"] / table["plain"])


def loader_rates(dataset: PatchDataset, batch_size: int, passes: int = 3) -> list[float]:
    """Patches per second that a data set gives, for every pass over it; the first one is cold."""
    rates = []
    for _ in range(passes):
        started = time.perf_counter()
        count = sum(len(batch.available) for batch in dataset.batches(batch_size))
        rates.append(count / (time.perf_counter() - started))
    return rates


@contextmanager
def _timed(model: nn.Module) -> Iterator[dict[str, float]]:
    """Yield seconds by part, complete when the block ends: of its modules, and the rest."""
    device = next(model.parameters()).device
    seconds = dict.fromkeys((*PARTS, "other"), 0.0)
    started: dict[nn.Module, float] = {}
    handles = []
    for part, names in PARTS.items():
        for module in (leaf for name in names for leaf in _called(getattr(model, name, None))):

            def before(module: nn.Module, _: object) -> None:
                started[module] = _now(device)

            def after(module: nn.Module, _: object, __: object, part: str = part) -> None:
                seconds[part] += _now(device) - started.pop(module)

            handles += [
                module.register_forward_pre_hook(before),
                module.register_forward_hook(after),
            ]
    begin = _now(device)
    try:
        yield seconds
    finally:
        seconds["other"] = _now(device) - begin - sum(seconds.values())
        for handle in handles:
            handle.remove()


def _called(module: nn.Module | None) -> Iterator[nn.Module]:
    """The modules that are called: those inside of lists and dictionaries of modules."""
    if isinstance(module, nn.ModuleList | nn.ModuleDict):
        for child in module.children():
            yield from _called(child)
    elif module is not None:
        yield module


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _distortion(latents: Tensor) -> Tensor:
    """D [K] from latents [K, B, ...] of which the last is the full scenario's."""
    return (latents - latents[-1]).double().square().flatten(1).mean(dim=1)


def _peak_resident() -> int:
    """Largest resident memory of this process so far, in bytes."""
    listed = Path("/proc/self/status")
    if listed.is_file():  # the system's own count goes on from that of the process that started it
        [line] = [line for line in listed.read_text().splitlines() if line.startswith("VmHWM:")]
        return int(line.split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _main(task: str) -> None:
    """Run a case twice in this process and print its peak memory in GB."""
    settings = json.loads(task)
    torch.set_num_threads(settings["threads"])
    run = _Workload.of(Case(**settings["case"]), "cpu").run(settings["form"])
    for _ in range(2):  # the second with the optimiser's state
        run()
    print(_peak_resident() / 1e9)


if __name__ == "__main__":
    _main(sys.argv[1])
