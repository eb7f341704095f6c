"""The smoke notebooks many times over in one process: memory, open files and disk stay flat."""

import gc
import shutil
from contextlib import chdir
from pathlib import Path

import matplotlib.pyplot as plt
import nbformat
import numpy as np
import psutil
import pytest
import torch
from study.commands import ROOT
from study.tiers import NOTEBOOKS

ROUNDS = 50
SETTLED = 10  # rounds in which caches fill


def run_notebook(path: Path, work: Path) -> None:
    """Run the code cells of a notebook in this process, in the notebook's folder."""
    names = {"__name__": "__main__"}
    with chdir(path.parent):
        for cell in nbformat.read(path, as_version=4).cells:
            if cell.cell_type == "code":
                exec(compile(cell.source, path.name, "exec"), names)
                if "parameters" in cell.metadata.get("tags", []):
                    names["work"] = str(work)


@pytest.mark.slow
def test_fifty_rounds_of_the_smoke_grid(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MPLBACKEND", "Agg")
    monkeypatch.setattr("torch.use_deterministic_algorithms", lambda *_, **__: None)
    threads, process = torch.get_num_threads(), psutil.Process()
    measured = []
    for _ in range(ROUNDS):
        shutil.rmtree(tmp_path / "runs", ignore_errors=True)  # or they would only be read
        for notebook in NOTEBOOKS.values():
            run_notebook(ROOT / "notebooks" / f"{notebook}.ipynb", tmp_path)
            plt.close("all")
        gc.collect()
        sizes = [path.stat().st_size for path in tmp_path.rglob("*") if path.is_file()]
        memory, opened = process.memory_info().rss / 2**20, len(process.open_files())
        measured.append((memory, opened, process.num_fds(), len(sizes), sum(sizes)))
    torch.set_num_threads(threads)
    memory, opened, descriptors, files, size = np.array(measured[SETTLED:]).T
    slope = np.polyfit(np.arange(len(memory)), memory, 1)[0]
    print(f"memory {memory[0]:.0f} to {memory[-1]:.0f} MB, {slope:+.2f} MB a round")
    assert slope < 1.0
    assert memory[-1] < 1.15 * memory[0]
    assert opened[-1] <= opened[0]
    assert descriptors[-1] <= descriptors[0]
    assert files[-1] == files[0]
    assert size[-1] == pytest.approx(size[0], rel=0.01)
