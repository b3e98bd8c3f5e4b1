"""The results of RLHF: the reward model's score and the hidden rule's, against the KL from the language model."""

from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from minirl.checks import ConfigError
from minirl.results.curves import apart, read_scalars
from minirl.results.figure import COLOURS, new_figure
from minirl.runs.directory import load_settings

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TAGS = {
    "texts/reward_score": "reward model's score",
    "texts/hidden_score": "hidden rule's score",
    "texts/grammatical": "share that the grammar accepts",
}


class Scores(NamedTuple):
    """What a run of rlhf logged at each of its updates (U,): the KL divergence, and which of the `TAGS` it has."""

    settings: dict[str, Any]
    kl: NDArray[np.float64]
    scores: dict[str, NDArray[np.float64]]


def read_scores(run_dir: Path) -> Scores:
    """Read a run's scores.

    Raises:
        ConfigError: if the directory holds no run of rlhf that has reached PPO.
    """
    settings = load_settings(run_dir)
    scalars = read_scalars(run_dir)
    if "texts/kl" not in scalars:
        raise ConfigError(f"{run_dir} must be a run of rlhf that has come to PPO, and has no texts/kl in its events")
    logged = {tag: np.array([event.value for event in events]) for tag, events in scalars.items()}
    return Scores(settings, logged["texts/kl"], {tag: logged[tag] for tag in TAGS if tag in logged})


def scores_figure(runs: list[Scores]) -> "Figure":
    """Draw each score against the square root of the KL divergence, as Gao et al. (2022) do, in a panel each.

    Raises:
        ConfigError: if matplotlib is missing.
    """
    tags = [tag for tag in TAGS if all(tag in run.scores for run in runs)]
    figure = new_figure(3.4 * max(len(tags), 2), 3.8 + 0.2 * len(runs))
    panels = figure.subplots(1, len(tags), squeeze=False)[0]
    names = [_name(run, runs) for run in runs]
    for axes, tag in zip(panels, tags, strict=True):
        for number, run in enumerate(runs):
            axes.plot(run.kl.clip(min=0), run.scores[tag], ".-", color=COLOURS[number % len(COLOURS)], linewidth=0.8)
        axes.set_xscale("function", functions=(lambda kl: np.sqrt(np.maximum(kl, 0)), np.square))
        most = max(float(run.kl.max()) for run in runs)
        axes.set_xticks([tick for tick in (0, 1, 3, 10, 30, 60, 100, 150, 200, 300, 500) if tick <= most])
        axes.set(xlabel="KL divergence, nats a text", title=TAGS[tag], xlim=(0, None))
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        if tag != "texts/reward_score":
            axes.set_ylim(-0.03, 1.03)
    figure.legend(panels[0].lines, names, loc="outside lower center", frameon=False, fontsize=9)
    return figure


def _name(run: Scores, runs: list[Scores]) -> str:
    """Name a run by its `kl_coef`, the settings that differ in other runs, and its seed."""
    differs = apart(run.settings, [other.settings for other in runs], "kl_coef", "num_episodes")
    return ", ".join([f"kl_coef {run.settings['kl_coef']}", *differs, f"seed {run.settings['seed']}"])
