"""Measure maps of large scenes: `python results/map/speed.py <folder, 4 GB> > speed.jsonl`.

The demo scene is repeated until it has 2,000 and 10,000 pixels on a side. Notebook 06 maps it with
the committed CMX, on one thread; processor time and memory are those of its process.
"""

import datetime
import json
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import rasterio
import torch
from study.data.manifest import load_manifest
from study.data.raw_files import fetch

ROOT = Path(__file__).parents[2]


def write_scene(demo: Path, folder: Path, side: int) -> None:
    """Write the demo scene, repeated to `side` pixels of 10 m."""
    for path in demo.rglob("*.jp2"):
        target = folder / path.relative_to(demo)
        target.parent.mkdir(parents=True, exist_ok=True)
        with rasterio.open(path) as raster:
            length = round(side * 10 / raster.res[0])
            repeats = [-(-length // count) for count in raster.shape]
            pixels = np.tile(raster.read(1), repeats)[:length, :length]
            profile = {"driver": "GTiff", "height": length, "width": length, "tiled": True}
            profile |= {"count": 1, "dtype": pixels.dtype, "compress": "deflate"}
            place = {"crs": raster.crs, "transform": raster.transform}
            with rasterio.open(target, "w", **profile, **place) as repeated:
                repeated.write(pixels, 1)


def main(folder: Path) -> None:
    """Write and map the scenes, and print a line for each."""
    source = load_manifest(ROOT / "data_manifest.yaml").dataset("demo").source
    demo = fetch(source, ROOT / "work" / "downloads" / "demo")
    for side in (2000, 10_000):
        raw = folder / f"raw{side}"
        write_scene(demo, raw, side)
        notebook = "notebooks/06_mapping.ipynb", str(folder / f"{side}.ipynb")
        command = [sys.executable, "-m", "papermill", *notebook, "--cwd", "notebooks"]
        command += ["-p", "raw", str(raw), "-p", "work", str(folder / str(side))]
        before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
        subprocess.run(command, check=True, cwd=ROOT, stdout=sys.stderr)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds = after.ru_utime - before
        found = {
            "side": side,
            "processor_s": round(seconds, 1),
            "megapixels_per_minute": round(side**2 / 1e6 / (seconds / 60), 1),
            "peak_mb": round(after.ru_maxrss / 1024),
            "torch": str(torch.__version__),
            "date": datetime.date.today().isoformat(),
        }
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve())
