"""Invented records: counts of pixels with known differences between methods."""

import numpy as np
import pandas as pd

from lsgs_core import ScenarioSet

SCENARIOS = ScenarioSet.of(["A", "B"])
CLASSES = ("x", "y")


def records_of(
    effects: dict[str, float], seeds: int, blocks: int = 12, draw: int = 0
) -> pd.DataFrame:
    """Records whose share of right pixels is that of the block and seed, plus a method's effect.

    Args:
        effects: Added to the share of right pixels, per method.
        seeds: Replicates.
        blocks: Spatial blocks.
        draw: Seed of the noise.
    """
    random = np.random.default_rng(draw)
    of_block = random.normal(0.5, 0.08, blocks)
    rows = []
    for method, effect in effects.items():
        for seed in range(seeds):
            # every run errs in its own way, in every block
            noise = random.normal(0, 0.01) + random.normal(0, 0.02, blocks)
            for block in range(blocks):
                for k, scenario in enumerate(SCENARIOS.names):
                    for label in CLASSES:
                        share = of_block[block] + noise[block] + effect + 0.05 * k
                        right = round(1000 * float(np.clip(share, 0, 1)))
                        counts = (right, 400, 1000 - right)
                        rows.append((method, seed, 0, block, scenario, label, *counts))
    columns = ["method", "seed", "fold", "block", "scenario", "class", "tp", "fp", "fn"]
    return pd.DataFrame(rows, columns=columns)
