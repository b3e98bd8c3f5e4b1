"""What all pictures have in common: importing matplotlib, size, colours and saving.

Matplotlib is an optional extra, so nothing here imports it before a picture is drawn. Figures are made without pyplot,
which keeps every figure alive and needs a display.
"""

from pathlib import Path
from typing import TYPE_CHECKING

from minirl.checks import ConfigError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DOTS_PER_INCH = 200  # of a printed page; the width of the pictures is that of a page, 7 to 11 inches
# Okabe and Ito's colours, which colour-blind people can tell apart; curves also differ in dashes, for printing in gray.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
DASHES = ("solid", (0, (5, 1.5)), (0, (4, 1.5, 1, 1.5)), (0, (1.2, 1.2)))


def require_matplotlib() -> None:
    """Raise ConfigError, which says how to install it, if matplotlib is missing."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise ConfigError("plots need matplotlib, the extra `plot`: pip install -e '.[plot]'") from error


def new_figure(width: float, height: float) -> "Figure":
    """Return an empty figure of this size in inches.

    Raises:
        ConfigError: if matplotlib is missing.
    """
    require_matplotlib()
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=DOTS_PER_INCH, layout="constrained")


def check_output(output: Path) -> None:
    """Check that a picture can be written where a flag says, before doing any work for it.

    Raises:
        ConfigError: if there is no such directory or kind of picture, or matplotlib is missing.
    """
    kinds = new_figure(1, 1).canvas.get_supported_filetypes()
    if output.suffix.removeprefix(".").lower() not in kinds or not output.parent.is_dir():
        raise ConfigError(
            "--output must be a picture that can be written: .png, .pdf or .svg, in a directory that exists, "
            f"not {output}"
        )


def save_figure(figure: "Figure", output: Path) -> None:
    """Write a figure as the kind of picture that the file's suffix says.

    Raises:
        ConfigError: if that can't be done.
    """
    try:
        figure.savefig(output)
    except (OSError, ValueError) as error:
        raise ConfigError(f"--output must be a picture that can be written: {error}") from error
