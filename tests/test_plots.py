"""`python -m minirl.plots`: learning curves, and what the command does with right and wrong arguments."""

import shutil
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from matplotlib.collections import PolyCollection

from minirl import plots
from minirl.envs.vector import Episode
from minirl.plots import Curve, curves_figure, read_curve
from minirl.ppo import PPOConfig
from minirl.q_learning import LOG_EVERY, QLearningConfig
from minirl.results.curves import group_by_seed, labels, mean_and_range
from minirl.runs.checkpoints import load_checkpoint
from minirl.runs.directory import save_config
from minirl.runs.run import Run
from tests.test_runs import Bomb

PICTURES = ("q-values", "policy-map", "action-probabilities", "preprocessing")


# Curves


def test_a_curve_joins_the_sessions_of_a_resumed_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("minirl.runs.run.time.monotonic", lambda: now[0])
    config = PPOConfig(checkpoint_frequency=20)

    def play(run: Run, steps: list[int], value: float) -> None:
        for step in steps:
            now[0] += 60
            run.log_episodes(step - 5, [Episode(0, value, 5)])
            run.log(step, {})
            run.checkpoint(step, dict)

    with Run("ppo", config, tmp_path / "run", total=100) as run:
        play(run, [10, 20, 30], -20.0)  # saved at 20, killed after 30
    now[0] += 10_000
    saved = load_checkpoint(tmp_path / "run", "ppo")
    assert saved["global_step"] == 20
    with Run("ppo", config, tmp_path / "run", total=100, done=20, resumed=saved) as run:
        play(run, [30, 40], -10.0)
    curve = read_curve(tmp_path / "run", LOG_EVERY)
    assert labels([[curve]]) == ["ppo PongNoFrameskip-v4, seed 42"]
    assert curve.steps.tolist() == [5, 15, 25, 35]
    assert curve.returns.tolist() == [-20, -20, -10, -10]
    assert curve.minutes.tolist() == pytest.approx([0.5, 1.5, 2.5, 3.5])


def test_the_mean_of_the_last_episodes() -> None:
    returns = np.array([1.0, 3.0, 8.0, 4.0])
    curve = Curve({}, np.arange(4), np.arange(4.0), returns)
    assert curve.mean_of_last(2).tolist() == [1.0, 2.0, 5.5, 6.0]
    assert curve.mean_of_last(100).tolist() == [1.0, 2.0, 4.0, 4.0]


def curve_of(seed: int, returns: list[float], steps: list[int], **settings: Any) -> Curve:
    """Ten steps a minute."""
    common = {"algorithm": "ppo", "env_id": "CartPole-v1", "seed": seed, "gamma": 0.9, "num_workers": 1, **settings}
    return Curve(common, np.array(steps), np.array(steps) / 10, np.array(returns))


def test_runs_that_differ_in_the_seed_only_are_a_group() -> None:
    one, two = curve_of(1, [0], [1]), curve_of(2, [0], [1], num_workers=7)
    other_gamma, other_algorithm = curve_of(3, [0], [1], gamma=0.5), curve_of(4, [0], [1], algorithm="dqn")
    groups = group_by_seed([one, other_gamma, two, other_algorithm])
    assert groups == [[one, two], [other_gamma], [other_algorithm]]
    assert labels(groups) == [
        "ppo CartPole-v1, gamma 0.9, 2 seeds",
        "ppo CartPole-v1, gamma 0.5, seed 3",
        "dqn CartPole-v1, seed 4",
    ]
    assert labels([[one, one, two]]) == ["ppo CartPole-v1, 3 runs"], "they are no three seeds"


def test_the_mean_goes_as_far_as_all_curves() -> None:
    xs = [np.array([0, 10, 20]), np.array([5, 15, 35])]
    ys = [np.array([0.0, 10.0, 0.0]), np.array([3.0, 13.0, 33.0])]
    # At 5, 10, 15, 20: 5, 10, 5, 0 and 3, 8, 13, 18
    for result, expected in zip(
        mean_and_range(xs, ys, points=4),
        [[5, 10, 15, 20], [4, 9, 9, 9], [3, 8, 5, 0], [5, 10, 13, 18]],
        strict=True,
    ):
        assert result.tolist() == pytest.approx(expected)


def test_the_figure_shows_each_group_and_its_band() -> None:
    figure = curves_figure(
        [
            curve_of(1, [0.0, 20.0], [10, 30]),
            curve_of(7, [5.0, 5.0, 8.0], [10, 20, 30], algorithm="dqn"),
            curve_of(2, [8.0, 8.0], [10, 30]),
        ]
    )
    by_steps, by_minutes = figure.axes
    assert (by_steps.get_xlabel(), by_minutes.get_xlabel()) == ("agent steps", "minutes of training")
    assert by_steps.get_ylabel() == "return, mean of the last 100 games"
    for axes, ends in [(by_steps, (10, 30)), (by_minutes, (1, 3))]:
        mean, single = (np.asarray(line.get_data(), float) for line in axes.lines)
        assert (mean[0, 0], mean[0, -1]) == pytest.approx(ends)
        assert (mean[1, 0], mean[1, -1]) == pytest.approx((4.0, 9.0))  # of 0 and 8; of 10 and 8
        assert single[1].tolist() == [5.0, 5.0, 6.0]
        (band,) = axes.collections
        assert isinstance(band, PolyCollection)
        corners = band.get_paths()[0].vertices
        assert isinstance(corners, np.ndarray)
        for end, low_and_high in zip(ends, ((0.0, 8.0), (8.0, 10.0)), strict=True):
            at_end = corners[np.isclose(corners[:, 0], end), 1]
            assert (at_end.min(), at_end.max()) == pytest.approx(low_and_high)
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["ppo CartPole-v1, 2 seeds", "dqn CartPole-v1, seed 7"]
    assert "minimum to maximum" in figure.get_suptitle()
    assert len({str(line.get_color()) for line in by_steps.lines}) == 2


def test_one_axis_may_be_chosen_and_a_single_run_has_no_band() -> None:
    figure = curves_figure([curve_of(1, [0.0, 20.0], [10, 30])], "minutes")
    (axes,) = figure.axes
    assert axes.get_xlabel() == "minutes of training"
    assert list(axes.collections) == []
    assert figure.get_suptitle() == "Return in training, CartPole-v1"


def test_a_curve_of_one_point_can_be_seen() -> None:
    point, other, line = curve_of(1, [5.0], [10]), curve_of(2, [7.0], [10]), curve_of(1, [0.0, 2.0], [1, 3], gamma=0.5)
    alone, usual = curves_figure([point, line], "steps").axes[0].lines
    assert (alone.get_marker(), usual.get_marker()) == ("o", "None")
    (axes,) = curves_figure([point, other], "steps").axes
    assert axes.lines[0].get_marker() == "o"
    (band,) = axes.collections
    assert np.min(band.get_linewidth()) > 0, "from the lowest to the highest, as wide as a point"


def test_plots_writes_a_picture(small_runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plots.main(
        [str(small_runs / "ppo"), str(small_runs / "ppo"), str(small_runs / "dqn"), "--output", str(tmp_path / "curve")]
    )
    output = capsys.readouterr()
    assert output.out == f"{tmp_path / 'curve.png'}\n"
    assert "2 of 2 runs" in output.err, "a run that is named twice is one"
    picture = cv2.imread(str(tmp_path / "curve.png"))
    assert picture is not None
    assert picture.shape[1] == 1800
    assert len(np.unique(picture.reshape(-1, 3), axis=0)) > 10, "not empty"


# The command


@pytest.mark.parametrize(
    ("run", "kind"), [("grid", "q-values"), ("dqn", "policy-map"), ("breakout", "preprocessing"), ("ppo", "curves")]
)
def test_the_command_writes_into_the_run_unless_told_otherwise(
    run: str, kind: str, small_runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(small_runs / run, tmp_path / "run")
    plots.main([str(tmp_path / "run"), "--kind", kind])
    written = tmp_path / "run" / ("curve.png" if kind == "curves" else f"{kind}.png")
    assert capsys.readouterr().out == f"{written}\n"
    picture = cv2.imread(str(written))
    assert picture is not None
    assert picture.std() > 25
    assert picture.shape[1] >= 1200, "200 dots per inch"


@pytest.mark.parametrize("kind", ["curves", *PICTURES])
def test_plots_without_matplotlib_say_how_to_get_it(
    kind: str, small_runs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    fitting = dict(zip(PICTURES, ["grid", "dqn", "breakout", "breakout"], strict=True)).get(kind, "ppo")
    with pytest.raises(SystemExit) as stop:
        plots.main([str(small_runs / fitting), "--kind", kind])
    message = "error: plots need matplotlib, the extra `plot`: pip install -e '.[plot]'\n"
    assert (stop.value.code, capsys.readouterr().err) == (2, message)


@pytest.mark.parametrize("kind", ["curves", *PICTURES])
def test_a_checkpoint_with_code_in_it_is_refused_and_not_run(
    kind: str, small_runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fitting = dict(zip(PICTURES, ["grid", "dqn", "breakout", "breakout"], strict=True)).get(kind, "ppo")
    shutil.copytree(small_runs / fitting, tmp_path / "run")
    for file in ("checkpoint.pt", "best.pt"):
        torch.save({"algorithm": "ppo", "bomb": Bomb(tmp_path / "exploded")}, tmp_path / "run" / file)
    arguments = [str(tmp_path / "run"), "--kind", kind]
    if kind in ("curves", "preprocessing"):  # which read no checkpoint
        plots.main(arguments)
    else:
        with pytest.raises(SystemExit) as stop:
            plots.main(arguments)
        assert stop.value.code == 2
        assert "must be a checkpoint that minirl wrote" in capsys.readouterr().err
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("nowhere", "nowhere must be a run directory"),
        ("nowhere --kind q-values", "nowhere must be a run directory"),
        ("empty", "empty must hold TensorBoard events of at least one finished episode"),
        ("empty --kind policy-map", "there is no checkpoint here"),
        ("{runs}/ppo --output no/such/dir.png", "--output must be a picture that can be written"),
        ("{runs}/ppo --output curve.xyz", "--output must be a picture that can be written"),
        ("{runs}/ppo --kind pie", "--kind: invalid choice: 'pie'"),
        ("{runs}/ppo --x hours", "--x: invalid choice: 'hours'"),
        ("{runs}/ppo {runs}/dqn --kind policy-map", "--kind policy-map must go with one RUN_DIR, not 2"),
        (
            "{runs}/ppo --kind q-values",
            "needs a run of q_learning on a grid (GridWorld, FrozenLake, CliffWalking) without wrappers, and ",
        ),
        ("taxi --kind q-values", "--kind q-values needs a run of q_learning on a grid"),
        ("{runs}/breakout --kind policy-map", "is one of ppo on BreakoutNoFrameskip-v4"),
        ("{runs}/grid --kind policy-map", "needs a run of dqn or ppo on CartPole without wrappers, and"),
        ("{runs}/grid --kind action-probabilities", "needs a run of ppo on an Atari game, and"),
        ("{runs}/dqn --kind action-probabilities", "is one of dqn on CartPole-v1"),
        ("{runs}/ppo --kind preprocessing", "needs a run of dqn or ppo on an Atari game, and"),
        ("gone --kind preprocessing", "--env-id must be an environment that Gymnasium can make"),
    ],
)
def test_plots_mistakes(
    line: str,
    message: str,
    small_runs: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, algorithm, config in [
        ("empty", "ppo", PPOConfig(env_id="CartPole-v1")),
        ("taxi", "q_learning", QLearningConfig(env_id="Taxi-v4")),
        ("gone", "ppo", PPOConfig(env_id="Gone-v1")),
    ]:
        (tmp_path / name).mkdir()
        save_config(tmp_path / name, algorithm, config)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(SystemExit) as stop:
        plots.main(line.format(runs=small_runs).split())
    output = capsys.readouterr()
    assert (stop.value.code, output.out) == (2, "")
    assert output.err.startswith("error: ")
    assert output.err.count("\n") == 1
    assert message in output.err
    assert sorted(tmp_path.rglob("*")) == before
