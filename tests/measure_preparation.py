"""Measure the preparation of a full-size synthetic Potsdam, and the loader; not a test.

    python tests/measure_preparation.py <empty folder, 5 GB> > results/benchmarks/preparation.jsonl

Writes tiles of 6000 × 6000 pixels in Potsdam's raw layout, prepares them in a process of its own,
and reads patches of 224 × 224 with 0, 1 and 2 workers. Peak memory is that of the process.
"""

import argparse
import contextlib
import datetime
import json
import os
import platform
import resource
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import rasterio
from scipy.ndimage import gaussian_filter

ROOT = Path(__file__).parents[1]
SIDE = 6000
# Three bands per modality, as in the paper's patches of 224 × 224 × 9.
NINE = {"RGB": ["red", "green", "blue"], "NIR": ["nir", "red", "green"]}
NINE |= {"height": ["height", "elevation", "nir"]}


def write_tiles(folder: Path, count: int) -> None:
    """Write tiles with the texture of aerial images: smooth shapes and sensor noise."""
    from raw_layouts import write_raster

    rng = np.random.default_rng(0)
    colours = np.array(
        [[255] * 3, [0, 0, 255], [0, 255, 255], [0, 255, 0], [255, 255, 0], [255, 0, 0]], np.uint8
    )
    for index in range(count):
        row, column = 2 + index // 3, 10 + index % 3
        name, padded = f"{row}_{column}", f"{row:02}_{column:02}"
        coarse = gaussian_filter(rng.standard_normal((SIDE // 10, SIDE // 10)), 4)
        ranks = np.argsort(np.argsort(coarse, axis=None)).reshape(coarse.shape) / coarse.size
        wide = np.kron(ranks, np.ones((10, 10)))
        image = np.stack([wide * gain for gain in (150, 140, 120, 170)]) + 40
        image += rng.standard_normal((4, SIDE, SIDE)) * 6
        labels = colours[(wide * 6).clip(max=5).astype(int)].transpose(2, 0, 1)
        places = {
            "4_Ortho_RGBIR": (f"{name}_RGBIR.tif", image.clip(0, 255).astype(np.uint8)),
            "1_DSM": (f"{padded}.tif", (30 + 10 * wide[None]).astype(np.float32)),
            "1_DSM_normalisation": (
                f"{padded}_normalized_lastools.jpg", (200 * wide[None]).astype(np.uint8)
            ),
            "5_Labels_all_noBoundary": (f"{name}_label_noBoundary.tif", labels),
        }  # fmt: skip
        for place, (file, pixels) in places.items():
            kind = "dsm" if "DSM" in place else "top"
            driver = "JPEG" if file.endswith("jpg") else "GTiff"
            write_raster(folder / place / f"{kind}_potsdam_{file}", pixels, driver)


def definition(nine: bool) -> object:
    """The manifest's Potsdam, or with three bands in each modality."""
    from study.data.manifest import Dataset, load_manifest
    from study.data.schema import read_yaml

    if not nine:
        return load_manifest(ROOT / "data_manifest.yaml").dataset("potsdam")
    content = read_yaml(ROOT / "data_manifest.yaml")["datasets"]["potsdam"]
    return Dataset.model_validate(content | {"modalities": NINE})


def prepare_all(folder: Path, nine: bool) -> None:
    """Prepare and print seconds, and the peak memory of this process in MB."""
    from study.data.patches import make_patches
    from study.data.preparation import prepare

    start = time.perf_counter()
    dataset = definition(nine)
    out = folder / ("nine" if nine else "prepared")
    with contextlib.redirect_stdout(sys.stderr):
        prepare(dataset, folder / "raw", out)
    middle = time.perf_counter()
    make_patches(dataset, out, "spatial", validation_blocks=4)
    end = time.perf_counter()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    found = {"modalities": "3 x 3 bands" if nine else "3, 1 and 2 bands"}
    found |= {"prepare_s": round(middle - start, 1), "patches_s": round(end - middle, 1)}
    raw = sum(path.stat().st_size for path in (folder / "raw").rglob("*.*")) / 1e6
    found |= {"raw_mb_per_s": round(raw / (middle - start), 1), "peak_mb": round(peak)}
    print(json.dumps(found))


def read_patches(folder: Path) -> None:
    """Print patches per second for 0, 1 and 2 workers, over the same batches."""
    import torch
    from study.data.patches import PatchDataset

    torch.set_num_threads(1)
    dataset = definition(nine=True)
    for workers in (0, 1, 2, 0, 1, 2):
        patches = PatchDataset(
            folder / "nine", dataset, "land_cover", 0, "training", workers=workers
        )
        order = np.random.default_rng(0).permutation(len(patches))[:512]
        start = time.perf_counter()
        count = sum(len(batch.available) for batch in patches.batches(8, order))
        rate = count / (time.perf_counter() - start)
        print(json.dumps({"workers": workers, "patches_per_s": round(rate, 1)}))


def main() -> None:
    """Run the parts, each in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--tiles", type=int, default=4)
    parser.add_argument("--part", choices=["write", "prepare", "nine", "read"])
    arguments = parser.parse_args()
    if arguments.part == "write":
        return write_tiles(arguments.folder / "raw", arguments.tiles)
    if arguments.part == "read":
        return read_patches(arguments.folder)
    if arguments.part:
        return prepare_all(arguments.folder, arguments.part == "nine")
    raw = arguments.folder / "raw"
    # Also the writing is a process of its own: a child starts with the peak memory of its parent.
    run = [sys.executable, __file__, arguments.folder, "--tiles", str(arguments.tiles), "--part"]
    if not raw.exists():
        subprocess.run([*run, "write"], check=True)
    environment = {
        "command": "python tests/measure_preparation.py <folder>",
        "date": datetime.date.today().isoformat(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {platform.system()}",
        "rasterio": rasterio.__version__,
    }
    print(json.dumps(environment), flush=True)
    size = sum(path.stat().st_size for path in raw.rglob("*.*")) / 1e6
    print(json.dumps({"tiles": arguments.tiles, "raw_mb": round(size)}), flush=True)
    for part in ("prepare", "nine", "read"):
        subprocess.run([*run, part], check=True)


if __name__ == "__main__":
    main()
