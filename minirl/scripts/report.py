"""What a finished run adds to its TensorBoard events: the return of some greedy games, and pictures.

This runs after the training is done and saved, and can't turn it into a failure: what does not work is left out, and a
line says so.
"""

import contextlib
import io
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary

from minirl.checks import ConfigError
from minirl.envs.ids import is_atari
from minirl.evaluate import evaluate, in_one_line
from minirl.evaluate.of_texts import in_lines
from minirl.plots import draw_curves
from minirl.plots.of_run import draw_picture, fitting_kinds
from minirl.results.figure import require_matplotlib, save_figure
from minirl.runs.checkpoints import CHECKPOINT_FILE, load_checkpoint
from minirl.runs.directory import load_settings, lock
from minirl.runs.events import new_name, picture_summary, write_events
from minirl.runs.progress import answer, say
from minirl.runs.settings import MAX_WHOLE

FINAL_GAMES, FINAL_ATARI_GAMES = 10, 2  # by default; a game of Pong takes seconds
FINAL_TEXTS = 500
# Seconds for games that were not asked for: a tenth of the training time, and never less or more than this.
SHORTEST_PATIENCE, LONGEST_PATIENCE = 3.0, 60.0


def check_final_games(games: int | None, config: Any) -> None:
    """Check the flag `--final-games`.

    Raises:
        ConfigError: if it is negative, or asks for games that the training itself plays.
    """
    if games is not None and not 0 <= games <= MAX_WHOLE:
        raise ConfigError(f"--final-games must be a whole number from 0 to {MAX_WHOLE}, not {games}")
    if games and judges_itself(vars(config)):
        raise ConfigError(
            "--final-games must be 0 or left out with eval_frequency: the last step's greedy games, "
            f"eval_episodes = {config.eval_episodes} of them, are logged already"
        )


def judges_itself(settings: dict[str, Any]) -> bool:
    """Whether the training itself logs the return of greedy games, also at its last step (DQN)."""
    return settings.get("eval_frequency") is not None


def report(run_dir: Path, games: int | None = None, device: str = "auto") -> None:
    """Write the mean return of greedy games, and the pictures that fit the run, to TensorBoard at the run's last step.

    Args:
        run_dir: the directory of a run that is done.
        games: how many; None for a few, which are left out if they would take long compared with the training.
        device: `auto`, `cpu` or `cuda`.
    """
    if not (run_dir / CHECKPOINT_FILE).exists():
        return  # nothing was trained
    with left_out("games and pictures"), contextlib.ExitStack() as stack:
        if (held := lock(run_dir)) is not None:  # the run is over, and another process could go on with it meanwhile
            stack.callback(os.close, held)
        settings = load_settings(run_dir)
        saved = load_checkpoint(run_dir, settings["algorithm"])
        if settings["algorithm"] == "rlhf":
            return report_texts(run_dir, FINAL_TEXTS if games is None else games, device)
        global_step: int = saved["global_step"]
        patience = min(max(SHORTEST_PATIENCE, saved["seconds"] / 10), LONGEST_PATIENCE) if games is None else math.inf
        if math.isfinite(saved["best_return"]):
            say(f"best network: mean return {saved['best_return']:.2f} in greedy games during the training")
        if games != 0 and not judges_itself(settings):
            with left_out("the games after the training"):
                number = games or (FINAL_ATARI_GAMES if is_atari(settings["env_id"]) else FINAL_GAMES)
                try:
                    result = evaluate(run_dir, episodes=number, device=device, patience=patience)
                except TimeoutError as error:
                    raise TimeoutError(f"{error}; --final-games N plays them") from None
                say(in_one_line(result))
                mean = Summary.Value(tag="eval/mean_return", simple_value=result["mean_return"])
                write_anew(run_dir, "games", global_step, Summary(value=[mean]))
        with left_out("pictures"):
            require_matplotlib()  # one line if it is missing, not one for each picture
            for kind in fitting_kinds(settings):
                with left_out(f"the picture {kind}"):
                    drawn = io.BytesIO()
                    draw_picture(kind, run_dir, device).savefig(drawn, format="png")
                    write_anew(run_dir, kind, global_step, picture_summary(f"pictures/{kind}", drawn.getvalue()))


def report_texts(run_dir: Path, number: int, device: str) -> None:
    """Print a table and some texts from before and after PPO; draw the scores of a run of rlhf, if it has any."""
    if number > 0:
        result = evaluate(run_dir, episodes=number, device=device)
        answer(in_lines(result))
        if "after" in result:
            with left_out("the picture of the scores"):
                save_figure(draw_curves([run_dir]), run_dir / "curve.png")
                answer(f"\n{run_dir / 'curve.png'}")


def write_anew(run_dir: Path, what: str, global_step: int, summary: Summary) -> None:
    """Write an event file of its own, which replaces what an earlier session wrote of the same at this step.

    A finished run that is resumed comes here again, and would have two values at one step.
    """
    suffix = f".{what}-{global_step}"
    earlier = list(run_dir.glob(f"events.out.tfevents.*{suffix}"))
    write_events(run_dir / (new_name() + suffix), Event(step=global_step, summary=summary))
    for file in earlier:
        file.unlink()


@contextlib.contextmanager
def left_out(what: str) -> Iterator[None]:
    """After an error in the block, say what is left out and continue."""
    try:
        yield
    except Exception as error:  # for example, a user's environment may raise anything when drawn
        reason = " ".join(str(error).split()) or type(error).__name__
        say(f"left out of TensorBoard: {what}: {reason}")
