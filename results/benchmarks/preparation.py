"""Measure the preparation of a full-size synthetic Potsdam, and the loader.

    python results/benchmarks/preparation.py <empty folder, 5 GB> > preparation.jsonl

Writes tiles of 6000 × 6000 pixels in Potsdam's raw layout, prepares them in a process of its own,
and reads patches of 224 × 224 with 0, 1 and 2 workers. Peak memory is that of the process.
"""

import contextlib
import datetime
import json
import os
import platform
import resource
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import rasterio
import torch
from scipy.ndimage import gaussian_filter
from study.data.manifest import Dataset
from study.data.patches import PatchDataset, make_patches
from study.data.preparation import prepare
from study.provenance.schema import read_yaml

SIDE, TILES = 6000, 4
POTSDAM = read_yaml(Path(__file__).parents[2] / "data_manifest.yaml")["datasets"]["potsdam"]
# Three bands per modality, as in the paper's patches of 224 × 224 × 9.
NINE = {"RGB": ["red", "green", "blue"], "NIR": ["nir", "red", "green"]}
NINE |= {"height": ["height", "elevation", "nir"]}
MODALITIES = {"3, 1 and 2 bands": POTSDAM["modalities"], "3 x 3 bands": NINE}


def write_tiles(folder: Path) -> None:
    """Write tiles with the texture of aerial images: smooth shapes and sensor noise."""
    rng = np.random.default_rng(0)
    colours = np.array(
        [[255] * 3, [0, 0, 255], [0, 255, 255], [0, 255, 0], [255, 255, 0], [255, 0, 0]], np.uint8
    )
    for index in range(TILES):
        row, column = 2 + index // 3, 10 + index % 3
        name, padded = f"top_potsdam_{row}_{column}", f"dsm_potsdam_{row:02}_{column:02}"
        coarse = gaussian_filter(rng.standard_normal((SIDE // 10, SIDE // 10)), 4)
        ranks = np.argsort(np.argsort(coarse, axis=None)).reshape(coarse.shape) / coarse.size
        wide = np.kron(ranks, np.ones((10, 10)))
        image = np.stack([wide * gain for gain in (150, 140, 120, 170)]) + 40
        image += rng.standard_normal((4, SIDE, SIDE)) * 6
        labels = colours[(wide * 6).clip(max=5).astype(int)].transpose(2, 0, 1)
        height = (200 * wide[None]).astype(np.uint8)
        for file, pixels in {
            f"4_Ortho_RGBIR/{name}_RGBIR.tif": image.clip(0, 255).astype(np.uint8),
            f"1_DSM/{padded}.tif": (30 + 10 * wide[None]).astype(np.float32),
            f"1_DSM_normalisation/{padded}_normalized_lastools.jpg": height,
            f"5_Labels_all_noBoundary/{name}_label_noBoundary.tif": labels,
        }.items():
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            shape = {"count": len(pixels), "height": SIDE, "width": SIDE, "dtype": pixels.dtype}
            with rasterio.open(folder / file, "w", **shape) as raster:
                raster.write(pixels)


def prepared(raw: Path, name: str) -> dict[str, Any]:
    """Prepare, and return seconds and the peak memory of this process in MB."""
    start = time.perf_counter()
    dataset = Dataset.model_validate(POTSDAM | {"modalities": MODALITIES[name]})
    with contextlib.redirect_stdout(sys.stderr):
        prepare(dataset, raw, raw.parent / name)
    middle = time.perf_counter()
    make_patches(dataset, raw.parent / name, "spatial", validation_blocks=4)
    end = time.perf_counter()
    return {
        "modalities": name,
        "prepare_s": round(middle - start, 1),
        "patches_s": round(end - middle, 1),
        "raw_mb_per_s": round(megabytes(raw) / (middle - start), 1),
        "peak_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
    }


def read(folder: Path, workers: int) -> dict[str, Any]:
    """Read batches and return the patches per second, of which every call has the same."""
    torch.set_num_threads(1)
    dataset = Dataset.model_validate(POTSDAM | {"modalities": NINE})
    patches = PatchDataset(folder, dataset, "land_cover", 0, "training", workers=workers)
    order = np.random.default_rng(0).permutation(len(patches))[:512]
    start = time.perf_counter()
    count = sum(len(batch.available) for batch in patches.batches(8, order))
    return {"workers": workers, "patches_per_s": round(count / (time.perf_counter() - start), 1)}


def megabytes(folder: Path) -> float:
    """The size of all files below a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*.*")) / 1e6


def main(raw: Path) -> None:
    """Print a line for each measurement, made in a process of its own."""
    about = {
        "command": "python results/benchmarks/preparation.py <folder>",
        "date": datetime.date.today().isoformat(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {platform.system()}",
        "rasterio": rasterio.__version__,
    }
    print(json.dumps(about), flush=True)
    # Also the writing is a process of its own: a child starts with the peak memory of its parent.
    with ProcessPoolExecutor(1, get_context("spawn"), max_tasks_per_child=1) as processes:
        processes.submit(write_tiles, raw).result()
        print(json.dumps({"tiles": TILES, "raw_mb": round(megabytes(raw))}), flush=True)
        measured = [processes.submit(prepared, raw, name) for name in MODALITIES]
        nine = raw.parent / "3 x 3 bands"
        measured += [processes.submit(read, nine, n) for n in (0, 1, 2, 0, 1, 2)]
        for line in measured:
            print(json.dumps(line.result()), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve() / "raw")
