"""The contract of `lsgs_core`: a wrong argument is answered by one sentence, or by a right result.

Each public function is called with arguments that are right but for one or two, which hypothesis
draws: of another type, shape, sign or size, not finite, absent or surplus. It raises `InputError`,
or an oracle confirms the result. Arguments stay as they are, and a call takes less than 10 s.
"""

import copy
import dataclasses
import inspect
import json
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import fields
from importlib import import_module
from pathlib import Path
from typing import Any, get_type_hints

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import nn

import lsgs_core
from lsgs_core import (
    AdaptedBackbone,
    Batch,
    HookedModel,
    InputError,
    ScenarioDropout,
    ScenarioSet,
    adaptive,
    build_backbone,
    distortion,
    distributions,
    methods,
    probabilities,
    randomness,
    regression,
    sampling,
    scoring_file,
    uncertainty,
)
from lsgs_core.models import lora
from lsgs_core.models.adapter import PredictionModel
from lsgs_core.models.cpu import accelerate_on_cpu

MODULES = (
    *("scenarios", "sampling", "distributions", "adaptive", "probabilities", "uncertainty"),
    *("distortion", "scoring_file", "randomness", "methods", "batch", "models", "models.adapter"),
    *("models.lora", "dropout", "regression"),
)
SET, K = ScenarioSet.of(["A", "B", "C"]), 7
D = np.array([1.0, 0.8, 0.9, 0.4, 0.5, 0.3, 0.0])
P = probabilities.scenario_probabilities(D).probabilities
MASKS = np.array(SET.masks)
SHIFT = np.random.default_rng(0).normal(size=(K, 3))
KERNEL = probabilities.rbf_kernel(D, 1.0)[0]
EIGEN = np.linalg.eigh(KERNEL)
PATCHES, BLOCKS = np.random.default_rng(1).random((20, K)), np.arange(20) // 2
PAPER = {"direction": 1.0, "ridge": 1e-3, "inverse_temperature": 0.5, "mixing": 0.5}
SCORES = distortion.ScenarioScores(SET, D, D, PATCHES, SHIFT, np.arange(20), BLOCKS, 0 * D)
PART = distortion.BatchScores(PATCHES, SHIFT, np.arange(20), BLOCKS)
EVIDENCE = methods.Evidence(
    SET, P, D, SHIFT, P, PAPER, epochs=3, steps=9, measure=lambda: P, prediction_distortion=D
)
AVAILABLE = torch.ones(2, 3, dtype=torch.bool)
IMAGES = [torch.ones(2, 2, 4, 4) for _ in range(3)]
BATCH = Batch(
    tuple(IMAGES), AVAILABLE, torch.ones(2, 1, 4, 4), torch.ones(2, 4, 4, dtype=torch.bool),
    torch.arange(2), torch.arange(2), torch.ones(2, 3, 4, 4, dtype=torch.bool),
)  # fmt: skip
FLOATS = [0, -1, 2, 0.5, 1e-320, 1e308, -1e308, np.nan, np.inf, -np.inf]
JUNK = st.sampled_from(
    [
        *(*FLOATS, 10**400, 10**5000, 2**64, 1j, True, None, "", "text", "x" * 9999, b"x", [], {}),
        *(set(), [None], ["a", "b"], [[1.0], [1.0, 2.0]], np.array("x"), np.zeros((0, K))),
        *(torch.ones(2, 3), print, object()),
    ]
)


class Foreign(nn.Module):
    """A network of others that takes images of any size and dtype."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.norm = nn.Linear(1, 4), nn.BatchNorm1d(4)

    def forward(self, images: list[torch.Tensor]) -> torch.Tensor:
        sums = [image.real.float().flatten(1).sum(dim=1, keepdim=True) for image in images]
        return self.norm(self.encoder(torch.stack(sums).sum(dim=0)))


NETWORK, DEMO = Foreign(), build_backbone("cmx", "demo", [2, 2, 2]).eval()
HOOKED = HookedModel(NETWORK, "encoder")
STACKED = HookedModel(
    nn.Sequential(nn.Conv2d(6, 1, 1)).eval(), "0", lambda net, images: net(torch.cat(images, 1))
).eval()


@dataclasses.dataclass
class Deferred:
    """A value whose making may be refused already."""

    make: Callable[[], Any]


def resolved(value: Any) -> Any:
    if isinstance(value, Deferred):
        return value.make()
    if isinstance(value, list | tuple):
        return type(value)(map(resolved, value))
    return {k: resolved(v) for k, v in value.items()} if isinstance(value, dict) else value


@st.composite
def spoiled(draw: st.DrawFn, value: Any, hint: Any = None) -> Any:
    """Something else than the right value, often near to it."""
    if hint in (bool, int, float, str) and draw(st.integers(0, 2)) == 0:
        return draw(st.from_type(hint))
    if not isinstance(value, methods.Evidence | Batch) and draw(st.integers(0, 3)) == 0:
        return draw(JUNK)
    if isinstance(value, torch.Tensor):
        if not value.is_floating_point() or draw(st.booleans()):
            changes = [value[:1], value[..., :1], value[None], value.flatten(), value.double()]
            changes += [value.to(torch.complex64), value.numpy(), value[:0], ~value.bool()]
            return draw(st.sampled_from(changes))
        result = value.clone().flatten()
        result[draw(st.integers(0, len(result) - 1))] = draw(st.sampled_from([0, -1, 2, np.nan]))
        return result.reshape(value.shape)
    if isinstance(value, np.ndarray):
        if draw(st.booleans()):
            kinds = [complex, str, object, np.int8, bool, np.float16]
            changes = [value[1:], value[..., 1:], value[None], value.T, value[:0], value.tolist()]
            changes += [value[::-1], np.concatenate([value, value]), 0 * value]
            return draw(st.sampled_from([*changes, *(value.astype(kind) for kind in kinds)]))
        result = value.astype(np.float64)
        if value.size:
            result.flat[draw(st.integers(0, value.size - 1))] = draw(st.sampled_from(FLOATS))
        return result
    if dataclasses.is_dataclass(value):
        name = draw(st.sampled_from([field.name for field in fields(value)]))
        other = draw(spoiled(getattr(value, name)))
        return Deferred(lambda: dataclasses.replace(value, **{name: resolved(other)}))
    if isinstance(value, Mapping) and value:
        name = draw(st.sampled_from([*value]))
        rest = {key: entry for key, entry in value.items() if key != name}
        other = {**value, name: draw(spoiled(value[name]))}
        return draw(st.sampled_from([rest, other, {**value, "more": 1}, [*value]]))
    if isinstance(value, list | tuple) and value:
        place = draw(st.integers(0, len(value) - 1))
        entries = list(value)
        entries[place] = draw(spoiled(value[place]))
        changes = [value[1:], [*value, value[0]], [*value] * 9, entries, tuple(entries)]
        return draw(st.sampled_from(changes))
    return draw(JUNK)


def any_p(p: Any) -> None:
    """A distribution."""
    assert (p.dtype, p.ndim) == (np.float64, 1)
    assert p.min() >= 0
    assert p.sum() == pytest.approx(1)


def finite(values: Any) -> None:
    assert np.isfinite(np.asarray(values, dtype=np.float64)).all()


def in_unit(numbers: Any) -> None:
    finite(numbers)
    assert ((np.asarray(numbers) >= 0) & (np.asarray(numbers) <= 1)).all()


def holds(statement: Any) -> None:
    assert statement


def indices(found: Any) -> None:
    assert ((np.asarray(found) >= 0) & (np.asarray(found) < K)).all()


def every_step(result: Any) -> None:
    any_p(result.probabilities)
    any_p(result.softmax)
    for values in (result.utility, result.kernel, result.smoothed, result.standardised):
        finite(values)
    assert result.lengthscale > 0


def scored(scores: Any) -> None:
    finite(scores.distortion)
    assert scores.distortion.min() >= 0
    assert scores.distortion[-1] == 0


def adapted(kind: Any) -> Any:
    """A sampler that is made, learns and is restored."""

    def call(scenario: Any, loss: Any, epoch: Any, state: Any, **arguments: Any) -> Any:
        sampler = kind(**arguments)
        sampler.observe(scenario, loss)
        own = isinstance(state, dict) and not state
        sampler.load_state_dict(sampler.state_dict() if own else state)
        return sampler.probabilities(epoch)

    return call


LEARNS: dict[str, Any] = {"scenario": np.array([0, 0, 2]), "loss": np.array([1.0, 0.5, 2])}
LEARNS |= {"epoch": 2, "state": {}, "prior": P}


def of_method(evidence: Any, name: Any, epoch: Any) -> Any:
    return methods.find_method(name).sampler(evidence).probabilities(epoch)


def entered(title: Any, family: Any, low_rank: Any, stream: Any) -> Any:
    """A method that is entered and taken out again."""

    def for_the_contract(evidence: Any) -> Any:
        """For the contract."""

    try:
        return methods.method(title, family, low_rank, stream)(for_the_contract)
    finally:
        methods.METHODS.pop("for_the_contract", None)


def read_evidence(content: Any, scenarios: Any) -> Any:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "scoring.json"
        digits = sys.get_int_max_str_digits()
        sys.set_int_max_str_digits(0)  # files can hold longer integers than Python writes
        try:
            path.write_text(json.dumps(content, default=str), "utf-8")
        finally:
            sys.set_int_max_str_digits(digits)
        return scoring_file.read_evidence(path, scenarios)


def with_lora(rank: Any) -> Any:
    model = copy.deepcopy(DEMO)
    count = lora.add_lora(model, rank)
    lora.training_mode(model)
    lora.merge_lora(model)
    return count


def dropped(images, indices, epoch, available, loss, **arguments):
    dropout = ScenarioDropout(**arguments)
    _, present = dropout(images, indices, epoch, available)
    dropout.observe(loss)
    return present


def of_samples(batch: Any, present: Any) -> Any:
    return torch.stack([batch.counted(present).flatten(1).any(1), batch.to("cpu").complete])


FILE = scoring_file.published_scoring(
    SCORES, probabilities.scenario_probabilities(D), "distortion", PAPER, "cmx", "a", "b", {}
)
SCORING: dict[str, Any] = {"model": HOOKED, "batches": [IMAGES, BATCH], "scenarios": SET}
SCORING |= {"device": "cpu", "progress": False}
DRAWING: dict[str, Any] = {"seed": 1, "epoch": 2, "indices": np.arange(3), "stage": "pretraining"}


def direct(function: Any, oracle: Any, /, **right: Any) -> dict[str, Any]:
    """A function, its right arguments and the oracle of its result, by its name."""
    return {function.__name__: (function, right, oracle)}


def learning(kind: Any, /, **right: Any) -> dict[str, Any]:
    """The same of a sampler that adapts."""
    return {kind.__name__: (adapted(kind), LEARNS | right, any_p)}


# Function, right arguments and an oracle of its result, by the public name.
CALLS: dict[str, tuple[Callable[..., Any], dict[str, Any], Callable[[Any], None]]] = {
    **direct(ScenarioSet, lambda s: in_unit(s.masks), modalities=("A", "B")),
    "ScenarioSet.of": (ScenarioSet.of, {"modalities": ["A", "B"]}, lambda s: in_unit(s.masks)),
    "ScenarioSet.index": (SET.index, {"available": [True, False, True]}, indices),
    **direct(randomness.generator, lambda random: in_unit(random.random()), stream="order", seed=1,
        epoch=2, index=3, stage="finetuning"),
    **direct(randomness.uniform_numbers, in_unit, stream="order", **DRAWING),
    **direct(sampling.draw_scenarios, indices, probabilities=P, servable=np.ones((3, K), bool),
        stream="scenario", **DRAWING),
    **direct(sampling.check_probabilities, any_p, probabilities=P),
    "ScenarioSampler": (sampling.ScenarioSampler().load_state_dict, {"state": {}}, lambda n: None),
    "FixedSampler": (adapted(lambda prior: sampling.FixedSampler(prior)), LEARNS, any_p),
    "FixedSampler.uniform": (
        lambda count: sampling.FixedSampler.uniform(count).probabilities(0), {"count": K}, any_p,
    ),
    **direct(distributions.bernoulli, any_p, scenarios=SET, keep=0.8),
    **direct(distributions.deployment_prior, any_p, scenarios=SET,
        failure_rates=np.array([0.1, 0.5, 1])),
    **direct(distributions.read_failure_rates, lambda p: p is None or any_p(p),
        text="A:0.1,B:0.2", scenarios=SET),
    **direct(distributions.by_cardinality, any_p, scenarios=SET, target=P),
    **direct(distributions.permuted, any_p, scenarios=SET, target=P, seed=1,
        within_cardinality=True),
    **direct(distributions.dirichlet, any_p, count=K, seed=1, concentration=5.0),
    **direct(distributions.coverage, any_p, utility=D, kernel=KERNEL, mixing=0.5, prior=P),
    **learning(adaptive.LossProportional, inverse_temperature=0.5, mixing=0.5, memory=0.9,
        kernel=KERNEL, ridge=0.3),
    **learning(adaptive.GroupDRO, step=0.1, mixing=0.9),
    **learning(adaptive.KernelGroupDRO, start=P, kernel=KERNEL, step=0.1, mixing=0.9, memory=0.9),
    **learning(adaptive.Exp3S, step=0.1, exploration=0.2, memory=0.9, window=3),
    **learning(adaptive.Curriculum, distortion=D, epochs=3, strength=1.0),
    "Online": (
        adapted(lambda prior, measure, every: adaptive.Online(prior, measure, every)),
        {**LEARNS, "measure": lambda: P, "every": 1}, any_p,
    ),
    **direct(probabilities.scenario_probabilities, every_step, distortion=D, **PAPER,
        lengthscale="median", prior=P, descriptors=SHIFT, smooth=True),
    **direct(probabilities.scenario_descriptors, finite, kind="latent_shift", masks=MASKS,
        distortion=D, latent_shift=SHIFT),
    **direct(probabilities.rbf_kernel, lambda found: in_unit(found[0]), descriptors=SHIFT,
        lengthscale=1.0),
    **direct(probabilities.smooth_scores, finite, kernel=KERNEL, utility=D, ridge=0.1),
    **direct(probabilities.likeliest_ridge, lambda ridge: in_unit(ridge / 1000),
        eigenvalues=EIGEN[0], eigenvectors=EIGEN[1], utility=D),
    **direct(probabilities.standardise, finite, scores=D),
    **direct(probabilities.total_variation, finite, first=P, second=P),
    **direct(uncertainty.bootstrap_probabilities, finite, patch_distortion=PATCHES, blocks=BLOCKS,
        to_probabilities=np.square, resamples=5, seed=1, predictive_error=D),
    "stop_when_precise": (
        lambda tolerance, to_probabilities, patches, **scored: uncertainty.stop_when_precise(
            tolerance, to_probabilities, patches
        )(**scored),
        {"tolerance": 0.1, "to_probabilities": np.square, "patches": 9, "patch_distortion": PATCHES,
         "blocks": BLOCKS},
        in_unit,
    ),
    **direct(uncertainty.smoothing_report,
        lambda report: finite([*(report | {"kernel_condition": 0}).values()]),
        distortion=D, settings=PAPER),
    **direct(distortion.score_scenarios, scored, **SCORING, until=lambda d, blocks: True,
        scenario_budget=7),
    "score_batches": (
        lambda **arguments: [*distortion.score_batches(**arguments)],
        SCORING,
        lambda parts: finite([part.distortion.sum() for part in parts]),
    ),
    **direct(regression.measured_scenarios, lambda found: in_unit(found / 14),
        scenarios=ScenarioSet.of([*"ABCD"]), budget=10),
    **direct(regression.regress_scenarios, lambda result: finite([*result.weights.T, result.error]),
        masks=MASKS, measured=np.array([0, 1, 5, 6]), distortion=D[[0, 1, 5, 6]]),
    **direct(uncertainty.stopping_error, finite, patch_distortion=PATCHES,
        to_probabilities=np.square, patches=30),
    **direct(distortion.joined_scores, lambda scores: finite(scores.distortion), parts=[PART],
        scenarios=SET, scenario_budget=0),
    **direct(distortion.clustered_standard_error, lambda error: holds(not (error < 0).any()),
        values=PATCHES, clusters=BLOCKS),
    **direct(scoring_file.published_scoring, lambda found: any_p(np.array(found["final_probs"])),
        scores=SCORES, result=probabilities.scenario_probabilities(D), descriptor="distortion",
        settings=PAPER, model_type="cmx", checkpoint="a", output="b", meta_info={"foldNo": 1}),
    **direct(read_evidence, lambda e: any_p(e.probabilities), content=FILE, scenarios=SET),
    "Evidence": (of_method, {"evidence": EVIDENCE, "name": "coverage", "epoch": 0}, any_p),
    "Evidence.required": (EVIDENCE.required, {"name": "distortion"}, lambda d: holds(d is D)),
    **direct(methods.without_evidence, lambda e: any_p(e.probabilities), scenarios=SET),
    "method": (
        entered, {"title": "x", "family": "LSGS", "low_rank": False, "stream": "order"},
        lambda sampler: holds(sampler.__name__ == "for_the_contract"),
    ),
    **direct(methods.find_method, lambda found: holds(found is methods.METHODS["lsgs"]),
        name="lsgs"),
    "Batch": (of_samples, {"batch": BATCH, "present": AVAILABLE}, in_unit),
    **direct(build_backbone, lambda model: holds(len(model.bands) > 1), name="cmx",
        preset="demo", bands=[2, 2], classes=2, stem_width=8, stage_widths=[8, 8, 8, 8],
        dropout=0.1),
    "Backbone": (
        lambda images, available: DEMO(images, available).detach(),
        {"images": [torch.ones(1, 2, 64, 64) for _ in range(3)], "available": AVAILABLE[:1]},
        lambda logits: holds(logits.shape == (1, 1, 64, 64)),
    ),
    "HookedModel": (
        lambda available, images, **arguments: HookedModel(NETWORK, **arguments)
        .latent(images, available).detach(),
        {"module": "encoder", "calls": 1, "images": IMAGES, "available": AVAILABLE},
        lambda latent: holds(latent.shape == (2, 4)),
    ),
    "AdaptedBackbone": (
        lambda images, available, **arguments: AdaptedBackbone(**arguments)
        .eval()(images, available).detach(),
        {"network": STACKED, "bands": [2, 2, 2], "classes": 1,
         "images": IMAGES, "available": AVAILABLE},
        lambda logits: holds(logits.shape == (2, 1, 4, 4)),
    ),
    "ScenarioDropout": (
        dropped,
        {"scenarios": SET, "sampler": P, "seed": 1, "stream": "order", "stage": "pretraining",
         "images": IMAGES, "indices": torch.tensor([4, 1]), "epoch": 2, "available": AVAILABLE,
         "loss": torch.tensor([0.5, 2])},
        in_unit,
    ),
    "PredictionModel": (
        lambda images, available, **arguments: PredictionModel(**arguments)
        .latent(images, available).detach(),
        {"model": DEMO, "exclusive": False, "images": IMAGES, "available": AVAILABLE},
        # NaN in a patch is NaN in its prediction: scoring refuses it, and names the patch.
        lambda predicted: in_unit(predicted.nan_to_num().numpy()),
    ),
    # DEMO has none of the paper's sizes: all weights are refused.
    **direct(lsgs_core.load_author_weights, lambda _: holds(False), model=DEMO,
        weights={"a": torch.ones(1)}),
    "add_lora": (with_lora, {"rank": 2}, lambda count: holds(count > 0)),
    **direct(lora.trained_parameters, lambda count: holds(count > 0), model=DEMO),
    **direct(accelerate_on_cpu, lambda model: holds(type(model) is type(DEMO)), model=DEMO),
}  # fmt: skip
# Results of functions in the table, what they call with them, and parts of networks.
ELSEWHERE = {
    "ScenarioScores", "BatchScores", "ScenarioProbabilities", "ScenarioRegression", "Method",
    "LowRankUpdate", "merge_lora", "training_mode",
}  # fmt: skip


def test_every_public_name_is_driven():
    names = {*lsgs_core.__all__} - {"InputError"}
    for module in map(import_module, (f"lsgs_core.{name}" for name in MODULES)):
        for name, value in vars(module).items():
            is_own = getattr(value, "__module__", "") == module.__name__
            is_public = not name.startswith("_")
            if is_own and is_public and inspect.isroutine(value) | inspect.isclass(value):
                names.add(name)
    names -= {method.sampler.__name__ for method in methods.METHODS.values()}
    assert names - ELSEWHERE - {name.partition(".")[0] for name in CALLS} == set()


def same(first: Any, second: Any) -> bool:
    if isinstance(first, nn.Module):
        return all(map(same, [first.training, *first.state_dict().values()],
                       [second.training, *second.state_dict().values()]))  # fmt: skip
    if isinstance(first, torch.Tensor):
        return torch.equal(first.nan_to_num(), second.nan_to_num())
    if isinstance(first, np.ndarray):
        return first.dtype == second.dtype and repr(first.tolist()) == repr(second.tolist())
    if dataclasses.is_dataclass(first):
        return all(same(getattr(first, f.name), getattr(second, f.name)) for f in fields(first))
    if isinstance(first, Mapping):
        return [*first] == [*second] and all(same(first[key], second[key]) for key in first)
    if isinstance(first, list | tuple):
        return len(first) == len(second) and all(map(same, first, second))
    return type(first) is type(second)  # all others cannot be changed


@pytest.mark.parametrize("name", CALLS)
@settings(
    max_examples=30,
    phases=[Phase.generate], derandomize=True, database=None, deadline=None,
    suppress_health_check=list(HealthCheck),
)  # fmt: skip
@given(data=st.data())
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_the_answer_is_one_sentence_or_right(name, data):
    function, right, oracle = CALLS[name]
    hints = get_type_hints(function) if inspect.isroutine(function) else {}
    arguments = dict(right)
    for field in data.draw(st.sets(st.sampled_from([*right]), max_size=2)):
        arguments[field] = data.draw(spoiled(right[field], hints.get(field)), label=field)
    started = time.monotonic()
    try:
        arguments = resolved(arguments)
        before = copy.deepcopy(arguments)
        result = function(**arguments)
    except InputError as error:
        sentence = str(error)
    else:
        sentence = "a right result"
        oracle(result)
    assert 10 < len(sentence) < 1000
    assert "\n" not in sentence
    assert time.monotonic() - started < 10
    if "before" in locals():
        assert same(before, arguments)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < 4 * 2**20  # KiB, torch included
