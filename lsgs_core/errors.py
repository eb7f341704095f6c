"""The exception for input that a user can correct, and the check of numbers that raises it."""

from reprlib import repr as shortened
from typing import Any

import numpy as np
from numpy.typing import NDArray


class InputError(ValueError):
    """A file, field or parameter is not what it has to be.

    The message is one sentence that names the file or field, says what was found and what was
    expected. It is raised before any long computation starts.
    """


class MissingFileError(InputError):
    """A required file does not exist."""


def real_numbers(field: str, values: Any) -> NDArray[np.float64]:
    """Return numbers as a new float64 array of the same shape.

    Raises:
        InputError: The values are no array of finite real numbers.
    """
    try:
        array = np.asarray(values)
        if array.dtype.kind not in "iuf":
            raise TypeError
        numbers = array.astype(np.float64)
    except (TypeError, ValueError, RuntimeError):  # text, complex numbers, rows of several lengths
        numbers = np.array(np.nan)
    if not np.isfinite(numbers).all():
        raise InputError(f"{field}: expected finite real numbers, found {shortened(values)}")
    return numbers
