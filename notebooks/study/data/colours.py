"""Colours of classes, and of whatever else has to be told apart."""

from collections.abc import Mapping, Sequence

import seaborn as sns

# Okabe and Ito's colours, which readers of every colour vision can tell apart.
PALETTE = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#000000")
GREY = "#999999"  # methods that are not in `METHODS`; pixels of none of the classes


def category_colours(count: int) -> list[str]:
    """Return `count` colours: those of the palette, or evenly spread hues if they are too few."""
    return list(PALETTE[:count]) if count <= len(PALETTE) else sns.husl_palette(count).as_hex()


def class_colours(classes: Sequence[str], colours: Mapping[str, str]) -> list[str]:
    """Return the colours of classes by their names; others take what the palette has left."""
    rest = [colour for colour in category_colours(len(classes)) if colour not in colours.values()]
    left = iter([*rest, *sns.husl_palette(len(classes)).as_hex()])
    return [colours.get(name) or next(left) for name in classes]
