"""Colours of plots and tables.

The plots use Okabe and Ito's palette, which colour-blind readers can tell apart.
"""

BLUE, VERMILION, GREEN, PINK = "#0072B2", "#D55E00", "#009E73", "#CC79A7"
ORANGE, SKY, BLACK, GREY = "#E69F00", "#56B4E9", "#000000", "#7F7F7F"
COLORS = (BLUE, VERMILION, GREEN, PINK, ORANGE, SKY, BLACK, GREY)


def accuracy_color(percent: float) -> str:
    """Returns the colour of an accuracy in a table: high, middling or low."""
    return GREEN if percent >= 90 else ORANGE if percent >= 50 else VERMILION
