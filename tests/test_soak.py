"""The smoke notebooks many times over in one process: memory, open files and disk stay flat."""

import gc
import json
import shutil
from contextlib import chdir
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import psutil
import pytest
import torch
from study.stages.tiers import NOTEBOOKS
from study.workflow.commands import ROOT

ROUNDS = 50
SETTLED = 10  # rounds in which caches fill


def run_notebook(path: Path, parameters: dict) -> None:
    """Run the code cells of a notebook in this process, in the notebook's folder."""
    names = {"__name__": "__main__"}
    with chdir(path.parent):
        for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
            if cell["cell_type"] == "code":
                exec(compile("".join(cell["source"]), path.name, "exec"), names)
                if "parameters" in cell["metadata"].get("tags", []):
                    names.update(parameters)


@pytest.mark.slow
def test_fifty_rounds_of_the_smoke_grid(tmp_path, monkeypatch):
    monkeypatch.setenv("MPLBACKEND", "Agg")
    monkeypatch.setattr("torch.use_deterministic_algorithms", lambda *_, **__: None)
    threads, process = torch.get_num_threads(), psutil.Process()
    downloads = tmp_path / "downloads"
    shutil.copytree(ROOT / "work" / "downloads" / "demo", downloads / "demo")
    work = tmp_path / "work"
    measured = []
    for _ in range(ROUNDS):
        shutil.rmtree(work / "runs", ignore_errors=True)  # or finished runs would only be read
        for notebook in NOTEBOOKS.values():
            parameters = {"work": str(work)}
            if notebook == NOTEBOOKS["data"]:
                parameters["downloads"] = str(downloads)
            run_notebook(ROOT / "notebooks" / f"{notebook}.ipynb", parameters)
            plt.close("all")
        gc.collect()
        files = [path for path in Path(tmp_path).rglob("*") if path.is_file()]
        size = sum(path.stat().st_size for path in files)
        memory = process.memory_info().rss / 2**20
        measured.append((memory, process.num_fds(), len(files), size))
    torch.set_num_threads(threads)
    memory, descriptors, files, size = np.array(measured[SETTLED:]).T
    slope = np.polyfit(np.arange(len(memory)), memory, 1)[0]
    assert slope < 1.0
    assert memory[-1] < 1.15 * memory[0]
    assert descriptors[-1] <= descriptors[0]
    assert files[-1] == files[0]
    assert size[-1] == pytest.approx(size[0], rel=0.01)
