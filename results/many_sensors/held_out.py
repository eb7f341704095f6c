"""How well budgets of scenarios predict the others: `python results/many_sensors/held_out.py`.

It reads D of every scenario from the files beside it, and writes `held_out.csv` and a figure there.
"""

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from scipy.stats import spearmanr

from lsgs_core import ScenarioSet, scenario_probabilities
from lsgs_core.probabilities import total_variation
from lsgs_core.regression import measured_scenarios, regress_scenarios

FOLDER = Path(__file__).parent
BUDGETS = {5: (16, 20), 8: (40, 48, 60), 10: (40, 50, 60, 80)}


def held_out(scenarios: ScenarioSet, distortion: np.ndarray, budget: int) -> pd.DataFrame:
    """The scenarios that are not measured: D, its prediction and error, and p of both."""
    measured = measured_scenarios(scenarios, budget)
    regression = regress_scenarios(scenarios.masks, measured, distortion[measured])
    predicted = np.maximum(regression.weights @ distortion[measured], 0)
    p, q = (scenario_probabilities(one).probabilities for one in (distortion, predicted))
    columns = {"D": distortion, "predicted": predicted, "error": regression.error, "p": p, "q": q}
    return pd.DataFrame(columns).assign(measured=np.isin(np.arange(len(p)), measured))


def summary(table: pd.DataFrame) -> dict[str, float]:
    """What the table of `held_out` says; total variations count measured scenarios too."""
    uniform, others = np.full(len(table), 1 / len(table)), table[~table["measured"]]
    deviation = (others["predicted"] - others["D"]) / others["error"]
    ratio = total_variation(table["p"], table["q"]) / total_variation(table["p"], uniform)
    relative = (others["q"] / others["p"] - 1).abs()
    return {
        "rank": spearmanr(others["D"], others["predicted"]).statistic,
        "median error of p": relative.median(),
        "largest error of p": relative.max(),
        "in 95 % intervals": (deviation.abs() < 1.96).mean(),
        "total variation ratio": ratio,
    }


if __name__ == "__main__":
    figure, axes = plt.subplots(1, 3, figsize=(10, 3.4), layout="constrained")
    rows = []
    for panel, (count, budgets) in zip(axes, BUDGETS.items(), strict=True):
        column = pd.read_csv(FOLDER / f"distortion-{count}.csv", index_col="scenario")["distortion"]
        scenarios = ScenarioSet.of([name for name in column.index if "+" not in name])
        for budget in budgets:
            table = held_out(scenarios, column.to_numpy(), budget)
            about = {"M": count, "scenarios": len(scenarios), "budget": budget}
            rows.append(about | summary(table))
        others = table[~table["measured"]]
        bars = 1.96 * others["error"]
        panel.errorbar(others["D"], others["predicted"], bars, fmt=".", elinewidth=0.3, alpha=0.6)
        panel.axline((0, 0), slope=1, color="#666666", linestyle=":")
        panel.set(title=f"{count} modalities: {budget} of {len(scenarios)} measured", xlabel="D")
    axes[0].set_ylabel("D predicted, 95 % interval")
    figure.savefig(FOLDER / "held_out.png", dpi=100)
    result = pd.DataFrame(rows)
    result.to_csv(FOLDER / "held_out.csv", index=False, float_format="%.3f")
    print(result.round(3).to_string(index=False))
