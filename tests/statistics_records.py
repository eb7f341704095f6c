"""Invented records: counts of pixels with known differences between methods."""

import numpy as np
import pandas as pd

from lsgs_core import ScenarioSet

SCENARIOS = ScenarioSet.of(["A", "B"])
CLASSES = ("x", "y")


def records_of(
    effects: dict[str, float], seeds: int, blocks: int = 12, draw: int = 0
) -> pd.DataFrame:
    """Records whose share of right pixels is that of block and seed, plus the method's effect."""
    random = np.random.default_rng(draw)
    of_block = random.normal(0.5, 0.08, blocks)
    shares = [  # every run errs in its own way, in every block
        of_block + (random.normal(0, 0.01) + random.normal(0, 0.02, blocks)) + effect
        for effect in effects.values()
        for _ in range(seeds)
    ]
    shares = np.add.outer(shares, 0.05 * np.arange(len(SCENARIOS))).repeat(len(CLASSES))
    right = (1000 * shares.clip(0, 1)).round().astype(int)
    keys = {"method": effects, "seed": range(seeds), "fold": [0], "block": range(blocks)}
    keys |= {"scenario": SCENARIOS.names, "class": CLASSES}
    table = pd.MultiIndex.from_product(keys.values(), names=keys).to_frame(index=False)
    return table.assign(tp=right, fp=400, fn=1000 - right)
