"""How p depends on the settings of the method."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from lsgs_core.probabilities import rbf_kernel, scenario_probabilities

# The values of each setting, varied one at a time. Lengthscales are multiples of the median
# distance between scenarios, since distortions of two backbones differ by orders of magnitude.
VARIED: dict[str, tuple[float, ...]] = {
    "inverse_temperature": (0.0, 0.25, 0.5, 1.0, 2.0, 4.0),
    "mixing": (0.0, 0.25, 0.5, 0.75, 1.0),
    "ridge": (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0),
    "lengthscale": (0.01, 0.1, 0.3, 1.0, 3.0, 10.0),
}


def sensitivity(distortion: NDArray[np.float64], settings: Mapping[str, Any]) -> pd.DataFrame:
    """Compute p with one setting varied and the others kept, from the same distortions D, [K].

    Returns:
        The columns setting, value, scenario (its index) and probability. Lengthscales are given as
        multiples of the median distance between scenarios.
    """
    descriptors = settings.get("descriptors")
    _, median = rbf_kernel(distortion if descriptors is None else descriptors, "median")
    rows = []
    for setting, values in VARIED.items():
        for value in values:
            used = value * median if setting == "lengthscale" else value
            result = scenario_probabilities(distortion, **{**settings, setting: used})
            rows += [(setting, value, k, p) for k, p in enumerate(result.probabilities)]
    return pd.DataFrame(rows, columns=["setting", "value", "scenario", "probability"])
