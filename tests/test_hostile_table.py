"""Kinds of hostile input: rows of hostile.yaml that say what is wrong, how, and what is answered.

A row puts other values at some places of a valid document, call or folder. Its answer is a part of
the one sentence of an `InputError`, or `right` where an oracle confirms the result. The page
results/hostile/README.md shows the table: `python tests/test_hostile_table.py` writes it.
"""

import copy
import dataclasses
import functools
import hashlib
import io
import json
import pickle
import shutil
import sys
import threading
import time
import warnings
import zipfile
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import rasterio
import raw_layouts as raw
import scipy.io
import torch
import yaml
from checkout import ROOT
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from study.data import alignment, raw_files
from study.data.manifest import load_manifest
from study.data.patches import PatchDataset, make_patches
from study.data.preparation import prepare
from study.provenance.artifacts import Record, check, describe, load_weights, save_weights
from study.provenance.files import make_folder
from study.provenance.schema import read_json
from study.stages.agreement import scoring_difference
from study.stages.parameters import checked_parameters, notebook_parameters
from study.stages.tiers import load_tier
from study.training.checkpoints import load_checkpoint, load_network
from study.training.settings import TrainingSettings
from study.workflow import commands
from test_contract import CALLS, FILE, SET, any_p

from lsgs_core import InputError, build_backbone, load_author_weights
from lsgs_core.methods import METHODS
from lsgs_core.scoring_file import read_evidence

PAGE = ROOT / "results" / "hostile" / "README.md"
AREAS = yaml.safe_load(Path(__file__).with_name("hostile.yaml").read_text("utf-8"))
ROWS = [(area, row) for area in AREAS for row in area["rows"]]
# What YAML cannot write, or not shortly.
NAMED: dict[str, Any] = {
    "<10**400>": 10**400, "<2**63>": 2**63, "<complex>": 1j, "<object>": object(), "<set>": {1},
    "<long>": "a" * 9999, "<nul>": "a\0b", "<bytes>": b"abc", "<nan array>": np.full(7, np.nan),
    "<tensor>": torch.ones(2, 3), "<deep>": functools.reduce(lambda x, _: [x], range(900), []),
    "<13 modalities>": {f"m{n}": ["VV"] for n in range(13)},
    "<254 values>": {f"v{n}": n for n in range(254)}, "<text array>": np.array(["a"] * 7),
    "<13 names>": [f"m{n}" for n in range(13)], "<empty array>": np.zeros((0, 7)),
    "<float32 infinity>": np.float32(np.inf),
}  # fmt: skip


def dumped(content: Any) -> str:
    return yaml.safe_dump(content, allow_unicode=True, sort_keys=False)


def named(value: Any) -> Any:
    """A value with what its names stand for."""
    if isinstance(value, list):
        return [named(entry) for entry in value]
    return NAMED.get(value, value) if isinstance(value, str) else value


def put(content: Any, path: list[str], value: Any) -> Any:
    """A copy of nested lists, dictionaries, arrays and dataclasses with another value at a path."""
    if not path:
        return named(value)
    first, *rest = path
    if dataclasses.is_dataclass(content):
        return dataclasses.replace(content, **{first: put(getattr(content, first), rest, value)})
    result = copy.deepcopy(content)
    key = first if isinstance(content, dict) else int(first)
    if value == "<absent>" and not rest:
        del result[key]
    else:
        inner = result.get(key, {}) if isinstance(content, dict) else result[key]
        result[key] = put(inner, rest, value)
    return result


def edit(path: Path, change: dict[str, Any], within: str = "") -> None:
    """Put other values into a YAML or JSON file, perhaps within a part of it."""
    is_json = path.suffix == ".json"
    content = (json.loads if is_json else yaml.safe_load)(path.read_text("utf-8"))
    for place, value in change.items():
        content = put(content, f"{within}.{place}".strip(".").split("."), value)
    path.write_text(json.dumps(content) if is_json else dumped(content), "utf-8")


def declare(path: Path, profile: dict[str, Any]) -> None:
    """A raster of this size and kind, of which no pixel is written."""
    whole = {"driver": "GTiff", "count": 3, "dtype": "uint8", "SPARSE_OK": True} | raw.ground()
    whole |= {"width": 96, "height": 96} | profile
    with rasterio.open(path, "w", **whole):
        pass


def twice(path: Path) -> None:
    folder = next(parent for parent in path.parents if parent.name == "raw")
    for name in "ab":
        other = folder / name / path.relative_to(folder)
        other.parent.mkdir(parents=True)
        shutil.copy(path, other)
    path.unlink()


def name_channel(path: Path, name: str) -> None:
    with rasterio.open(path, "r+") as raster:
        raster.descriptions = (name,)


def flip(path: Path, *positions: int) -> None:
    content = bytearray(path.read_bytes())
    for position in positions:
        content[position] ^= 255
    path.write_bytes(content)


def yaml_bomb(path: Path, merged: bool) -> None:
    """Thirty lines that stand for 9^29 entries."""
    lines = ["a0: &a0 {x: 1}"]
    for n in range(1, 30):
        if merged:
            lines.append(f"a{n}: &a{n} {{<<: [{', '.join([f'*a{n - 1}'] * 9)}], k{n}: 1}}")
        else:
            entries = ", ".join(f"k{i}: *a{n - 1}" for i in range(9))
            lines.append(f"a{n}: &a{n} {{{entries}}}")
    path.write_text("\n".join(lines))


class Server(BaseHTTPRequestHandler):
    """Answers as the first part of an address says: a status, `page`, `short` or the file."""

    def do_GET(self) -> None:
        kind = self.path.split("/")[1]
        content = b"<html>log in</html>" if kind == "page" else b"0" * 1000
        self.send_response(int(kind) if kind.isdigit() else 200)
        self.send_header("Location", "file:///etc/hostname")
        self.send_header("Content-Length", str(len(content) + 500 * (kind == "short")))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: Any) -> None: ...


def wheel(path: Path, name: str = "a.bin", size: int = 1000, method: int = 8) -> None:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", method) as archive:
        archive.writestr(name, b"0" * size)
    path.write_bytes(content.getvalue())


class Fuse:
    """Unpickling it would end the process."""

    def __reduce__(self) -> Any:
        return (sys.exit, ("code of a file was run",))


def changed(entries: dict[str, Any], change: dict[str, Any]) -> dict[str, Any]:
    """Entries of a checkpoint, some by a name of what is done to them; all others are the same."""
    entries = dict(entries)
    for name, how in change.items():
        tensor = entries.pop(name, torch.ones(1))
        match how:
            case "missing":
                pass
            case "renamed":
                entries[f"{name}x"] = tensor
            case "wider":
                entries[name] = torch.zeros(*tensor.shape, 2)
            case "shorter":
                entries[name] = tensor[:1]
            case float():
                entries[name] = torch.full(tensor.shape, how, dtype=torch.float64)
            case str() if hasattr(torch, how):
                entries[name] = tensor.to(getattr(torch, how))
            case _:
                entries[name] = how
    return entries


def weights(path: Path, change: dict[str, Any]) -> None:
    """A checkpoint of ours with its record, some of whose entries are others."""
    zeros, ones = ({name: [value] * 3 for name in "ABC"} for value in (0.0, 1.0))
    description = {
        "bands": {name: list("rgb") for name in "ABC"}, "classes": ["x"], "task_kind": "binary",
        "patch_size": 64, "pixel_size": 10.0, "means": zeros, "deviations": ones,
    }  # fmt: skip
    made_with = {"model": network().configuration, "description": description}
    save_weights(path, changed(network().state_dict(), change), Record(made_with))


def authors(path: Path, change: dict[str, Any], wrapper: str = "") -> None:
    """A checkpoint in the authors' layout, whose entries take no space but for the changed ones."""
    listed = json.loads((ROOT / "tests" / "reference" / "cbc.state_dict.json").read_text())
    entries = {
        name: torch.zeros((), dtype=getattr(torch, entry["dtype"])).expand(entry["shape"])
        for name, entry in listed.items()
    }
    entries = changed(entries, change)
    torch.save({wrapper: entries} if wrapper else entries, path)


DEEDS: dict[str, Callable[..., Any]] = {
    "changed": edit,
    "missing": Path.unlink,
    "folder": lambda path: (path.unlink(), path.mkdir()),
    "written": lambda path, text: (
        make_folder(path.parent) and path.write_bytes(text.encode("latin-1"))
    ),
    "repeated": lambda path, text, times: path.write_text(text * times),
    "cut": lambda path, count: path.write_bytes(path.read_bytes()[:-count]),
    "longer": lambda path, count: path.write_bytes(path.read_bytes() + bytes(count)),
    "replaced": lambda path, old, new: path.write_text(path.read_text().replace(old, new, 1)),
    "flipped": flip,
    "twice": twice,
    "swapped": lambda path, other: shutil.copy(path.with_name(other), path),
    "plus": lambda path, number: raw.rewrite(path, lambda pixels: pixels + number),
    "times": lambda path, number: raw.rewrite(path, lambda pixels: pixels * number),
    "channels": lambda path, *chosen: raw.rewrite(path, lambda pixels: pixels[list(chosen)]),
    "smaller": lambda path, rows: raw.rewrite(path, lambda pixels: pixels[:, :rows]),
    "as": lambda path, kind: raw.rewrite(path, lambda pixels: pixels.astype(kind)),
    "placed": lambda path, place: raw.rewrite(path, **place),
    "declared": declare,
    "named": name_channel,
    "mat": lambda path, name, *shape: scipy.io.savemat(path, {name: np.zeros(shape)}),
    "bomb": yaml_bomb,
    "wheel": wheel,
    "weights": weights,
    "authors": authors,
    "polygons": lambda path, change: raw.draw_fields(path, **change),
    "pickle": lambda path: path.write_bytes(pickle.dumps({"model": Fuse()})),
    "torch": lambda path: torch.save({"model": Fuse()}, path),
    "described": lambda path: describe(path, Record({})),
}


@functools.cache
def network() -> Any:
    torch.manual_seed(0)
    return build_backbone("cmx", "demo")


def manifest(folder: Path, name: str) -> None:
    (folder / "manifest.yaml").write_text(dumped({"datasets": {name: raw.ENTRIES[name]}}))


def layout(folder: Path, name: str) -> None:
    manifest(folder, name)
    np.savez(folder / "expected.npz", **getattr(raw, f"write_{name}")(folder / "raw"))


def prepared(folder: Path) -> None:
    layout(folder, "pair")
    prepare(raw.dataset("pair"), folder / "raw", folder / "prepared")
    make_patches(raw.dataset("pair"), folder / "prepared")
    (folder / "overrides.json").write_text("{}")
    np.savez(folder / "images.npz", **images(folder))


def images(folder: Path) -> dict[str, Any]:
    """The images and labels of all patches for training."""
    patches = PatchDataset(folder / "prepared", the_dataset(folder), "land_cover", 0, "training")
    batch = patches.batch(range(len(patches)))
    return dict(zip([*patches.modalities, "labels"], [*batch.images, batch.target], strict=True))


def project(folder: Path) -> None:
    """Notebooks, a tier and a manifest, all smaller."""
    (folder / "notebooks" / "tiers").mkdir(parents=True)
    for path in (ROOT / "notebooks").glob("*.ipynb"):
        shutil.copy(path, folder / "notebooks")
        defaults = notebook_parameters(path)
        (folder / f"{path.stem}.json").write_text(json.dumps(defaults))
    shutil.copy(ROOT / "notebooks" / "tiers" / "demo.yaml", folder / "notebooks/tiers/own.yaml")
    content = yaml.safe_load(raw.MANIFEST.read_text("utf-8"))
    kept = {name: content["datasets"][name] for name in ("demo", "landsat7", "potsdam")}
    (folder / "data_manifest.yaml").write_text(dumped(content | {"datasets": kept}))
    (folder / "arguments.json").write_text('{"arguments": ["run", "own", "--dry-run"]}')


def files(folder: Path) -> None:
    """A checkpoint of ours, a scoring, settings of a training, and a wheel with its source."""
    weights(folder / "weights.safetensors", {})
    for name in ("scoring.json", "committed.json"):
        whole = FILE | {"prediction_distortion": FILE["D_sh"]}
        (folder / name).write_text(json.dumps(whole))
    (folder / "training.json").write_text('{"epochs": 1}')
    wheel(folder / "a.whl")
    authors(folder / "authors.pth", {})
    entry = copy.deepcopy(raw.ENTRIES["demo"])
    entry["source"]["members"] += [member("a.bin")]
    (folder / "manifest.yaml").write_text(dumped({"datasets": {"demo": entry}}))


def member(path: str) -> dict[str, Any]:
    return {"path": path, "size": 1000, "sha256": hashlib.sha256(b"0" * 1000).hexdigest()}


def served(folder: Path) -> None:
    """A data set whose files have addresses on this machine."""
    names = ["optical.tif", "radar.tif", "clouds.tif", "labels.tif", "a.bin"]
    source = {"access": "download", "url": "http://127.0.0.1:1/right/"}
    entry = raw.ENTRIES["pair"] | {"source": source | {"members": [*map(member, names)]}}
    (folder / "manifest.yaml").write_text(dumped({"datasets": {"pair": entry}}))


def the_dataset(folder: Path) -> Any:
    [dataset] = load_manifest(folder / "manifest.yaml").datasets.values()
    return dataset


def prepares(folder: Path, _: str) -> None:
    try:
        record = prepare(the_dataset(folder), folder / "raw", folder / "prepared")
    except InputError:
        assert not (folder / "prepared").exists()
        raise
    expected = np.load(folder / "expected.npz")
    assert set(record.scenes) == set(expected)
    for scene, codes in expected.items():
        assert (raw.read_raster(folder / "prepared" / scene / "labels.tif")[0] == codes).all()
    assert record.complete


def reads_patches(folder: Path, _: str) -> None:
    found = images(folder)
    for name, right in np.load(folder / "images.npz").items():
        np.testing.assert_array_equal(found[name], right)


def makes_patches(folder: Path, _: str) -> None:
    index, overrides = folder / "index.txt", read_json(folder / "overrides.json")
    chosen = overrides.pop("folds", ""), index if index.exists() else None
    make_patches(the_dataset(folder), folder / "prepared", *chosen, **overrides)


def loads_tier(folder: Path, _: str) -> None:
    tier = load_tier("own", folder)
    given = yaml.safe_load((folder / "notebooks/tiers/own.yaml").read_text())
    for section in given.keys() & tier.sections.keys():
        assert given[section].items() <= tier.sections[section].items()


def checks_parameters(folder: Path, file: str) -> None:
    given = read_json(folder / file)
    given["manifest"] = given.get("manifest", "").replace("../data_", f"{folder}/data_")
    assert checked_parameters(Path(file).stem, given) == given


def loads_weights(folder: Path, _: str) -> None:
    path = folder / "weights.safetensors"
    model = copy.deepcopy(network())
    with torch.no_grad():
        next(model.parameters()).zero_()  # which the file's weights replace
    before = copy.deepcopy(model.state_dict())
    try:
        load_checkpoint(model, path)
    except InputError:  # what was refused has changed nothing
        after = model.state_dict()
        assert all(torch.equal(after[key], value) for key, value in before.items())
        raise
    found, _ = load_weights(path)
    assert all(torch.equal(model.state_dict()[key], value.float()) for key, value in found.items()
               if value.is_floating_point())  # fmt: skip


def reads_scoring(folder: Path, file: str) -> None:
    evidence = read_evidence(folder / (file or "scoring.json"), SET)
    evidence = dataclasses.replace(
        evidence, epochs=1, steps=1, measure=lambda: evidence.probabilities
    )
    for method in METHODS.values():
        p = method.sampler(evidence).probabilities(0)
        assert p.shape == (7,)
        any_p(p)


def fetches(folder: Path, _: str) -> None:
    source, to = the_dataset(folder).source, folder / "downloads"
    before = {*to.rglob("*.*")}
    source = source.model_copy(update={"members": source.members[-1:]})
    server = ThreadingHTTPServer(("127.0.0.1", 0), Server)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    if source.access == "download":
        url = source.url.replace(":1/", f":{server.server_port}/")
        source = source.model_copy(update={"url": url})
    try:
        with mock.patch.object(raw_files, "_download", return_value=folder / "a.whl"):
            raw_files.fetch(source, to)
    except InputError as error:
        assert {*to.rglob("*.*")} == before  # nothing half
        raise InputError(str(error).replace(f":{server.server_port}/", ":1/")) from None
    finally:
        server.shutdown(), thread.join(), server.server_close()
    assert (to / source.members[0].path).read_bytes() == b"0" * 1000


@functools.cache
def published() -> Any:
    """The published network, whose weights take no memory, and change by no loading."""
    with torch.device("meta"):
        return build_backbone("cbc", "paper", [3, 3, 3], 1)


def loads_authors(folder: Path, _: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        load_author_weights(published(), folder / "authors.pth")


def runs_command(folder: Path, _: str) -> None:
    said, arguments = io.StringIO(), read_json(folder / "arguments.json")["arguments"]
    with (
        mock.patch.object(commands, "ROOT", folder), redirect_stdout(said), redirect_stderr(said),
        mock.patch.object(commands, "_snakemake", return_value=0),
    ):  # fmt: skip
        try:
            status = commands.main(arguments)
        except SystemExit as error:
            status = error.code
    if status:
        last = said.getvalue().strip().rpartition("error: ")[2]
        assert status == 2
        assert "Traceback" not in said.getvalue()
        raise InputError(last)


DOES: dict[str, Callable[[Path, str], Any]] = {
    "load_manifest": lambda folder, file: load_manifest(folder / (file or "manifest.yaml")),
    "prepare": prepares,
    "make_patches": makes_patches,
    "PatchDataset": reads_patches,
    "load_tier": loads_tier,
    "checked_parameters": checks_parameters,
    "load_checkpoint": loads_weights,
    "read_evidence": reads_scoring,
    "scoring_difference": lambda folder, file: scoring_difference(
        folder / file, folder / "committed.json"
    ),
    "TrainingSettings": lambda folder, file: TrainingSettings(**read_json(folder / file)),
    "check": lambda folder, file: check(folder / "weights.safetensors"),
    "load_network": lambda folder, file: load_network(folder / "weights.safetensors"),
    "load_author_weights": loads_authors,
    "main": runs_command,
    "fetch": fetches,
}
VALID = manifest, layout, prepared, project, files, served
BASES: dict[str, Callable[..., None]] = {base.__name__: base for base in VALID}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Folders with what is valid, each made once."""

    @functools.cache
    def folder(base: str) -> Path:
        made = tmp_path_factory.mktemp("base")
        kind, *names = base.split()
        BASES[kind](made, *names)
        return made

    return folder


def calls(change: dict[str, Any]) -> None:
    """Call a function of the core with other arguments; the contract's oracle looks at a result."""
    name = next(iter(change)).rpartition(".")[0]
    while name not in CALLS:
        name = name.rpartition(".")[0]
    function, arguments, oracle = CALLS[name]
    for place, value in change.items():
        arguments = put(arguments, place.removeprefix(f"{name}.").split("."), value)
    result = function(**arguments)
    if oracle is not None:
        oracle(result)


def answer_of(area: dict[str, Any], how: dict[str, Any], folders: Any, folder: Path) -> str:
    """What is answered to a row: the sentence, or `right`."""
    try:
        if area["does"] == "call":
            calls(how)
        else:
            shutil.copytree(folders(area["base"]), folder, dirs_exist_ok=True)
            file = area.get("file", "")
            if file:
                edit(folder / file, how, area.get("within", ""))
            for place, deeds in {} if file else how.items():
                for deed, *details in deeds if isinstance(deeds[0], list) else [deeds]:
                    found = sorted(folder.glob(place)) or [folder / place]
                    DEEDS[deed](found[0], *details)
            DOES[area["does"]](folder, file)
    except InputError as error:
        return " ".join(str(error).replace(f"{folder}/", "").split())
    return "right"


@pytest.mark.parametrize(("area", "row"), ROWS, ids=[row["what"] for _, row in ROWS])
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_the_answer_is_that_of_the_table(area, row, folders, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT / "notebooks")
    started = time.process_time()
    answer = answer_of(area, row["how"], folders, tmp_path)
    assert row["answer"] in answer
    assert row["answer"] == "right" or 10 < len(row["answer"]) <= len(answer) < 2000
    assert time.process_time() - started < 10


def test_what_is_changed_is_right_before(folders, tmp_path_factory):
    """Or a row could be refused for another reason than its own."""
    for area in AREAS:
        if area["does"] != "call":
            folder = tmp_path_factory.mktemp("right")
            assert answer_of(area, {}, folders, folder) == "right", area["area"]


bounded = settings(max_examples=10, deadline=None, suppress_health_check=list(HealthCheck))
JUNK = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
JUNK |= st.sampled_from(["<absent>", "<10**400>", "<long>", "../../x", "${", "\0", [], {}, [[1]]])


def places(content: Any, path: str = "") -> list[str]:
    """The path of every entry of nested lists and dictionaries."""
    entries = content.items() if isinstance(content, dict) else enumerate(content)
    found = []
    for key, value in entries:
        inside = places(value, f"{path}{key}.") if isinstance(value, dict | list) else []
        found += [f"{path}{key}", *inside]
    return found


@pytest.mark.parametrize("does", ["load_manifest", "load_tier", "read_evidence", "load_network"])
@bounded
@given(data=st.data())
def test_junk_anywhere_is_named_or_right(does, data, folders, tmp_path_factory):
    area = next(area for area in AREAS if area["does"] == does)
    content = yaml.safe_load((folders(area["base"]) / area["file"]).read_text("utf-8"))
    how = {data.draw(st.sampled_from(places(content))): data.draw(JUNK)}
    answer_of(area | {"within": ""}, how, folders, tmp_path_factory.mktemp("junk"))


@bounded
@given(data=st.data())
def test_rasters_with_other_bytes_raise_nothing_else(data, folders, tmp_path_factory):
    """A header that claims a million pixels is large here: reading all of them takes a while."""
    folder = tmp_path_factory.mktemp("bytes")
    shutil.copytree(folders("layout pair"), folder, dirs_exist_ok=True)
    path = data.draw(st.sampled_from(sorted((folder / "raw").glob("*.tif"))))
    flip(path, *data.draw(st.lists(st.integers(0, 600), min_size=1, max_size=5)))
    DEEDS["cut"](path, data.draw(st.sampled_from([1, 8, 4000, 9000])))
    with suppress(InputError), mock.patch.object(alignment, "MOST_PIXELS", 10**6):
        prepare(the_dataset(folder), folder / "raw", folder / "prepared")
        make_patches(the_dataset(folder), folder / "prepared")


HEAD = """# Hostile input, and what is answered

{all} kinds: {refused} are refused in one sentence, of which a part is shown,
{right} give a result that an oracle confirms. Written by `python tests/test_hostile_table.py` from
[hostile.yaml](../../tests/hostile.yaml); the tests try every row.
"""


def page() -> str:
    """The table in Markdown."""
    right = sum(row["answer"] == "right" for _, row in ROWS)
    lines = [HEAD.format(all=len(ROWS), refused=len(ROWS) - right, right=right)]
    for area in AREAS:
        title = f"## {area['area']}: {len(area['rows'])}"
        lines += [title, "", "| what is wrong | answer |", "|---|---|"]
        for row in area["rows"]:
            what, answer = (row[name].replace("|", r"\|") for name in ("what", "answer"))
            lines.append(f"| {what} | {answer} |")
        lines.append("")
    return "\n".join(lines)


def test_the_page_shows_the_table():
    kinds = [row["what"] for _, row in ROWS]
    assert len(set(kinds)) == len(kinds) >= 300
    assert PAGE.read_text("utf-8") == page()


if __name__ == "__main__":
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(page(), "utf-8")
