"""The exception for input that a user can correct, and the checks of arguments that raise it."""

import reprlib
import sys
from collections.abc import Callable, Iterable, Sequence
from numbers import Integral, Real
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

LARGEST_COUNT = 2**16  # of bands, classes, channels, samples and so on
Floats = NDArray[np.float64]  # docstrings say their shapes
Shape = Sequence[int | None]  # None stands for any length
EXPECTED = {  # by the kinds of numpy's dtypes
    "b": "an array of True and False",
    "iu": "an array of integers",
    "iuf": "finite real numbers",
}


class InputError(ValueError):
    """One sentence that names a file, field or parameter, what was expected and what was found.

    It is raised before any long computation, but for what only that shows, such as a latent of NaN.
    """

    @classmethod
    def of(cls, field: str, expected: str, found: Any) -> Self:
        """Return the error that shows what was found of a field, on one line and shortened."""
        return cls(f"{field}: expected {expected}, found {shown(found)}")


def shown(value: Any) -> str:
    """Return a value for a message: on one line, and shortened."""
    try:
        return " ".join(reprlib.repr(value).split())
    except ValueError:  # an integer of more than 4300 digits
        return f"a {type(value).__name__}"


def real_numbers(field: str, values: Any, shape: Shape | None = None) -> Floats:
    """Return finite real numbers as a new float64 array; else raise `InputError`."""
    array = array_of(field, values, "iuf", shape)
    with np.errstate(over="ignore"):
        numbers = array.astype(np.float64)
    if not np.isfinite(numbers).all():
        raise InputError.of(field, EXPECTED["iuf"], values)
    return numbers


def array_of(field: str, values: Any, kinds: str, shape: Shape | None) -> NDArray[Any]:
    """Return an array of one of the kinds in `EXPECTED`; else raise `InputError`.

    An empty list fits all kinds.
    """
    try:
        array = np.asarray(values)
        right = array.dtype.kind in kinds or (array.size == 0 and isinstance(values, list | tuple))
    except (TypeError, ValueError, RuntimeError):  # such as rows of several lengths
        right = False
    if not right:
        raise InputError.of(field, EXPECTED[kinds], values)
    check_shape(field, array, shape)
    return array


def check_shape(field: str, array: Any, shape: Shape | None) -> None:
    """Raise `InputError` where an array or tensor has another shape than expected."""
    found = list(array.shape)
    fitted = [m if n is None else n for n, m in zip(shape or [], found, strict=False)]
    if shape is not None and (fitted != found or len(found) != len(shape)):
        lengths = ", ".join("any" if n is None else str(n) for n in shape)
        raise InputError(f"{field}: expected shape [{lengths}], found {found}")


def check_number(field: str, value: Any, right: Callable[[float], bool], expected: str) -> float:
    """Return a finite real number for which `right` is True; else raise `InputError`."""
    plain = value.item() if isinstance(value, np.floating) else value  # float32 rounds the limit
    number = isinstance(plain, Real) and not isinstance(plain, bool)
    if not number or not abs(plain) <= sys.float_info.max or not right(plain):
        raise InputError.of(field, expected, value)
    return float(plain)


def check_count(field: str, value: Any, least: int = 1, most: int = LARGEST_COUNT) -> int:
    """Return an integer within limits, which no boolean is; else raise `InputError`."""
    whole = isinstance(value, Integral) and not isinstance(value, bool)
    if not whole or not least <= int(value) <= most:
        raise InputError.of(field, f"an integer from {least} to {most}", value)
    return int(value)


def check_type(field: str, value: Any, *kinds: Any) -> None:
    """Raise `InputError` where a value is of none of these types; `Callable` is one of them."""
    if not isinstance(value, kinds):
        names = " or ".join(kind.__name__ for kind in kinds)
        raise InputError.of(field, f"a {names}", value)


def check_choice(field: str, value: Any, names: Iterable[str]) -> None:
    """Raise `InputError` where a value is none of these names."""
    if not isinstance(value, str) or value not in names:
        raise InputError.of(field, f"one of {sorted(names)}", value)
