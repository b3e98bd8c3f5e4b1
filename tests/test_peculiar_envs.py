"""What environments may return, and what happens if they return something else: the table in docs/reliability.md.

The environments are those of tests/peculiar_envs.py, played by all three algorithms.
"""

import re
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest

from minirl import dqn, evaluate, ppo, q_learning
from minirl.checks import ConfigError
from minirl.envs import ids
from minirl.envs.atari import MaxAndSkip, NoopReset
from minirl.envs.episode import EpisodeStatistics
from minirl.envs.guard import EnvError
from minirl.envs.make import make_env
from minirl.runs.checkpoints import load_checkpoint
from minirl.scripts.train import run_training
from tests.fake_atari import FakeAtari
from tests.peculiar_envs import PLACES, paying, showing
from tests.test_docs import blocks

ROOT = Path(__file__).parent.parent
ALGORITHMS: dict[str, tuple[Any, Any, str]] = {
    "ppo": (
        ppo.PPOConfig,
        ppo.train,
        "--num-envs 2 --num-steps 8 --minibatch-size 8 --update-epochs 1 --total-timesteps 48",
    ),
    "dqn": (
        dqn.DQNConfig,
        dqn.train,
        "--total-timesteps 30 --learning-starts 16 --batch-size 8 --buffer-size 64 "
        "--eval-frequency 15 --eval-episodes 2 --confirm-episodes 1",
    ),
    "q_learning": (q_learning.QLearningConfig, q_learning.train, "--num-episodes 6"),
}
every_algorithm = pytest.mark.parametrize("algorithm", ALGORITHMS)
networks = pytest.mark.parametrize("algorithm", ["ppo", "dqn"])


@pytest.fixture(autouse=True)
def _nothing_was_warned_of() -> None:
    ids.warn.cache_clear()


def id_of(name: str, algorithm: str) -> str:
    return f"tests.peculiar_envs:{name}{'Table' if algorithm == 'q_learning' else ''}-v0"


def train(algorithm: str, env_id: str, run_dir: Path, *flags: str) -> None:
    config_class, function, tiny = ALGORITHMS[algorithm]
    argv = [*f"--env-id {env_id} {tiny} --run-dir {run_dir} --device cpu".split(), *flags]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # functions can't be captured
        run_training(algorithm, config_class, function, "", argv)


def assert_one_line_and_their_frames(errors: str, line: str, raised: str | None) -> None:
    """Check the final output: a line that matches the pattern `line`, and the environment's traceback if it raised."""
    message, *trace = errors[errors.index("error: ") :].splitlines()
    assert re.fullmatch(f"error: {line}", message), message
    if raised is None:
        assert trace == []
        return
    assert trace[0] == "Traceback (most recent call last):"
    files = re.findall(r'File "(.+)", line', "\n".join(trace))
    assert files, "they need it"
    assert {Path(file).name for file in files} == {"peculiar_envs.py"}, "nothing of ours, and nothing of Gymnasium's"
    assert "\n".join(trace).endswith(raised)


# Faults

HOLE = "LookupError: the map\nhas a hole"
OLD = "follows the old Gym API: `reset` must return .observation, info."
NO_DICT = "raised AssertionError: The second element returned by .* was not a dictionary.*"  # Gymnasium's checker
# The environment, when, what is said, and what they raised.
FAULTS: list[tuple[str, str, str, str | None]] = [
    ("RewardNone", "at its step 3", "paid a reward that is no number: None", None),
    ("RewardText", "at its step 3", "paid a reward that is no number: '1'", None),
    ("RewardPair", "at its step 3", r"paid a reward that is no number: array\(\[1., 2.\]\)", None),
    ("RewardList", "at its step 3", r"paid a reward that is no number: \[1.0\]", None),
    ("Four", "at its step 3", ".* old Gym API: `step` must return .observation, reward, terminated, .*", None),
    ("NoInfo", "at its step 3", "returned an info that is no dictionary: None", None),
    ("Exits", "at its step 3", "raised SystemExit: the window was closed", "SystemExit: the window was closed"),
    ("ResetAlone", "in its first reset", OLD, None),
    ("ResetPair", "in its first reset", f"({OLD}|{NO_DICT})", None),
    ("OldReset", "in its first reset", "follows the old Gym API: `reset` must take `seed` and `options`", None),
    ("Raises", "at its step 3", "raised LookupError: the map has a hole", HOLE),
    ("ResetRaises", "in its first reset", "raised LookupError: the map has a hole", HOLE),
]
BOX_FAULTS: list[tuple[str, str, str, str | None]] = [
    ("RewardNan", "at its step 3", "gave a reward that is not finite", None),
    ("Shape", "at its step 3", r"showed an observation of shape \(3,\), not \(2,\)", None),
    ("Ragged", "at its step 3", r"showed an observation that is no array of numbers: \[\[1.0\], \[1.0, 2.0\]\]", None),
    ("Nothing", "at its step 3", "showed an observation that is no array of numbers: None", None),
    ("Words", "at its step 3", "showed an observation that is no array of numbers: 'here'", None),
    ("NotFinite", "at its step 3", "gave an observation that is not finite", None),
    ("NotFiniteFirst", "in its first reset", "gave an observation that is not finite", None),
    ("Wrapped", "at its step 3", "showed an observation of int64 with numbers that uint8 has not", None),
    ("NoChoice", "in its first reset", r"showed the observation \[0, 2\], which is not in MultiDiscrete.*", None),
]
STATE_FAULTS: list[tuple[str, str, str, str | None]] = [
    ("Minus", "at its step 3", "showed the state -1, and its space has 0 to 5", None),
    ("Beyond", "at its step 3", "showed the state 6, and its space has 0 to 5", None),
    ("Float", "at its step 3", "showed a state that is no whole number: 3.0", None),
    ("Words", "at its step 3", "showed a state that is no whole number: 'here'", None),
]
CASES = [
    *((algorithm, id_of(fault[0], algorithm), fault) for algorithm in ALGORITHMS for fault in FAULTS),
    *((algorithm, id_of(fault[0], algorithm), fault) for algorithm in ("ppo", "dqn") for fault in BOX_FAULTS),
    *((algorithm, id_of(fault[0], "q_learning"), fault) for algorithm in ALGORITHMS for fault in STATE_FAULTS),
]


@pytest.mark.parametrize(("algorithm", "env_id", "fault"), CASES, ids=[f"{case[0]} {case[1]}" for case in CASES])
def test_a_fault_in_training_is_one_line_and_their_traceback(
    algorithm: str, env_id: str, fault: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    _, when, what, raised = fault
    with pytest.raises(SystemExit) as stop:
        train(algorithm, env_id, tmp_path / "run")
    assert stop.value.code == 1
    line = rf"environment 0 \({env_id.partition(':')[2]}\), {when}, {what}"
    assert_one_line_and_their_frames(capfd.readouterr().err, line, raised)


@every_algorithm
def test_an_environment_that_raises_while_it_is_made(
    algorithm: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    env_id = id_of("NeverMade", algorithm)
    with pytest.raises(SystemExit) as stop:
        train(algorithm, env_id, tmp_path / "run")
    assert stop.value.code == 1
    line = f"environment {env_id} can't be made: it raised KeyError: 'level'"
    assert_one_line_and_their_frames(capfd.readouterr().err, line, "KeyError: 'level'")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("text", "raised"),
    [
        ("import no_such_module", "ModuleNotFoundError: No module named 'no_such_module'"),
        ("1 / 0", "ZeroDivisionError: division by zero"),
        ("def step(:", "SyntaxError: invalid syntax"),
    ],
)
def test_a_module_that_cannot_be_imported(
    text: str, raised: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "broken_module.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(SystemExit) as stop:
        train("ppo", "broken_module:MyEnv-v0", tmp_path / "run")
    assert stop.value.code == 1
    errors, kind = capfd.readouterr().err, raised.split(":")[0]
    assert errors.startswith(f"error: environment broken_module:MyEnv-v0 can't be made: it raised {kind}: ")
    assert errors.endswith(f"{raised}\n")
    assert set(re.findall(r'File "(.+)", line', errors)) == {str(tmp_path / "broken_module.py")}


@every_algorithm
def test_a_caller_gets_one_error_and_theirs_as_its_cause(algorithm: str) -> None:
    config_class, function, _ = ALGORITHMS[algorithm]
    short = {"num_episodes": 5} if algorithm == "q_learning" else {"total_timesteps": 2048}
    with pytest.raises(EnvError, match=r"at its step 3, raised LookupError: the map has a hole$") as caught:
        function(config_class(env_id=id_of("Raises", algorithm), **short))
    assert isinstance(caught.value.__cause__, LookupError)


@every_algorithm
def test_a_fault_in_evaluation(
    algorithm: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    env_id = id_of("Plain", algorithm)
    train(algorithm, env_id, tmp_path / "run")
    kwargs = gym.registry[env_id.partition(":")[2]].kwargs
    for odd, what in (
        (paying(None)["odd"], "paid a reward that is no number: None"),
        (showing(-1)["odd"], "showed "),
    ):
        monkeypatch.setitem(kwargs, "odd", odd)
        for flags, name in (([], "environment 0"), (["--video", str(tmp_path / "a.gif")], "environment")):
            capfd.readouterr()
            with pytest.raises(SystemExit) as stop:
                evaluate.main([str(tmp_path / "run"), "--device", "cpu", *flags])
            assert stop.value.code == 1
            line = rf"{name} \({env_id.partition(':')[2]}\), at its step 3, {what}.*"
            assert_one_line_and_their_frames(capfd.readouterr().err, line, None)


@every_algorithm
def test_a_fault_in_drawing(algorithm: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    env_id = id_of("RenderRaises", algorithm)
    with pytest.raises(SystemExit) as stop:
        train(algorithm, env_id, tmp_path / "run", "--video-frequency", "8")
    assert stop.value.code == 1
    line = rf"environment \({env_id.partition(':')[2]}\), drawn at its step 0, raised LookupError: the map has a hole"
    assert_one_line_and_their_frames(capfd.readouterr().err, line, HOLE)


@pytest.mark.slow
def test_a_fault_in_processes_of_their_own(tmp_path: Path) -> None:
    tiny = ALGORITHMS["ppo"][2]
    command = f"train_ppo.py --env-id {id_of('Raises', 'ppo')} {tiny} --num-workers 2 --device cpu --run-dir"
    result = subprocess.run(
        [sys.executable, *command.split(), str(tmp_path / "run")], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert (result.returncode, result.stdout) == (1, "")
    line = r"environment . \(Raises-v0\), at its step 3, raised LookupError: the map has a hole"
    assert_one_line_and_their_frames(result.stderr, line, HOLE)


# What may be returned

RETURNS = {"Plain": 5.0, "RewardArray": 7.0, "RewardFloat32": 7.0, "RewardInt64": 7.0, "RewardBool": 5.0}
RETURNS |= {"RewardScalarArray": 7.0, "EndArrays": 3.0, "Listed": 5.0, "Doubles": 5.0, "Messages": 5.0}
OF_STATES = {"StateArray": 5.0, "StateInt64": 5.0}
OF_OTHERS = {"Choices": 5.0, "Bits": 5.0, "FromTen": 5.0}
RUNS = [
    *((algorithm, id_of(name, algorithm), value) for algorithm in ("ppo", "dqn") for name, value in RETURNS.items()),
    *(
        (algorithm, id_of(name, "q_learning"), value)
        for algorithm in ALGORITHMS
        for name, value in {**RETURNS, **OF_STATES}.items()
        if name not in ("Listed", "Doubles")
    ),
    *((algorithm, id_of(name, "ppo"), value) for algorithm in ("ppo", "dqn") for name, value in OF_OTHERS.items()),
    *(
        (algorithm, f"tests.peculiar_envs:Images-{kind}-v0", 5.0)
        for algorithm in ("ppo", "dqn")
        for kind in ("uint8", "int32", "int64", "float32")
    ),
]


@pytest.mark.parametrize(("algorithm", "env_id", "value"), RUNS, ids=[f"{run[0]} {run[1]}" for run in RUNS])
def test_what_is_paid_is_what_is_counted(algorithm: str, env_id: str, value: float, tmp_path: Path) -> None:
    train(algorithm, env_id, tmp_path / "run", "--video-frequency", "16")
    returns = load_checkpoint(tmp_path / "run", algorithm)["returns"]
    assert len(returns) >= 5
    assert set(returns) == {value}
    assert {type(number) for number in returns} == {float}
    assert list((tmp_path / "run" / "videos").iterdir())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert evaluate.evaluate(tmp_path / "run", episodes=3, device="cpu")["returns"] == [value] * 3


def test_what_a_game_pays_while_it_resets_belongs_to_it_and_nothing_of_it_is_in_info() -> None:
    env = EpisodeStatistics(MaxAndSkip(NoopReset(FakeAtari(rewards={1: 5.0, 3: 2.0}, ends_at=9), noop_max=1)))
    _, info = env.reset(seed=0)
    assert info == FakeAtari().reset()[1]
    for _ in range(2):
        *_, info = env.step(0)
    assert info["episode"] == {"r": 7.0, "l": 2}
    assert env.finished == [(7.0, 2)]


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("PlainTable", [[1, 0, 0, 0, 0, 0], [0, 1, 0, 0, 0, 0]]),
        ("FromTen", [[1, 0, 0, 0, 0, 0], [0, 1, 0, 0, 0, 0]]),
        ("Choices", [[1, 0, 0, 0, 0, 0, 1, 0], [0, 1, 0, 0, 0, 0, 0, 1]]),
        ("Bits", [[0, 0], [0, 1]]),
    ],
)
def test_networks_see_choices_as_zeros_and_ones(name: str, shown: list[list[int]]) -> None:
    env = make_env(f"tests.peculiar_envs:{name}-v0")
    seen = [env.reset(seed=0)[0].tolist(), env.step(np.int64(0))[0].tolist()]
    assert seen == shown
    assert isinstance(env.observation_space, gym.spaces.Box)
    assert env.observation_space.shape == (len(shown[0]),)


# Warnings


@every_algorithm
@pytest.mark.parametrize("name", ["RewardArray", "StateArray"])
def test_the_number_in_an_array_of_one_is_taken_with_a_warning(algorithm: str, name: str) -> None:
    config_class, function, _ = ALGORITHMS[algorithm]
    env_id = id_of(name, "q_learning")
    if algorithm == "q_learning":
        config = config_class(env_id=env_id, num_episodes=6)
    else:
        sizes: Any = {"num_steps": 8, "minibatch_size": 8} if algorithm == "ppo" else {"learning_starts": 64}
        config = config_class(env_id=env_id, total_timesteps=65, num_envs=1, **sizes)
    what = "reward" if name == "RewardArray" else "state"
    with pytest.warns(UserWarning, match=f"returns a {what} as an array of shape .1,.: its one number") as seen:
        function(config)
    assert len([warning for warning in seen if "its one number is taken" in str(warning.message)]) == 1


@pytest.mark.slow
def test_gymnasiums_checker_warns_once_of_each_thing(tmp_path: Path) -> None:
    command = f"train_ppo.py --env-id {id_of('Doubles', 'ppo')} {ALGORITHMS['ppo'][2]} --num-workers 2 --run-dir"
    result = subprocess.run(
        [sys.executable, *command.split(), str(tmp_path / "run"), "--video-frequency", "16"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    warned = re.findall(r"WARN: The obs returned by the `(\w+)\(\)` method was expecting", result.stderr)
    assert sorted(warned) == ["reset", "step"], "not for each environment, process, video and game after the training"


# Spaces that are refused

ONE_ARRAY = "--env-id must have observations that are one array, not "
FLAT = r"put gymnasium.wrappers.FlattenObservation\(env\) around it"
IMAGES = r"--env-id must have vectors \(n,\) or images .* of at least 36x36 as observations, not shape "
HERE = r" \(docs/environments.md\)"
REFUSED = [
    ("Empty", r"--env-id must have observations of at least one number, not of shape \(0,\)"),
    ("Scalar", rf"{IMAGES}\(\): {FLAT}{HERE}"),
    ("Flat", IMAGES + r".*ReshapeObservation\(env, \(1, 84, 84\)\) around it" + HERE),
    ("Gray", IMAGES + r".*ReshapeObservation\(env, \(1, 84, 84\)\) around it" + HERE),
    (
        "ColoursLast",
        IMAGES + r".*TransformObservation\(env, lambda obs: obs.transpose\(2, 0, 1\), "
        r"Box\(0, 255, \(3, 84, 84\), np.uint8\)\) around it" + HERE,
    ),
    ("Cells", rf"{IMAGES}\(7, 7, 3\): {FLAT}{HERE}"),
    ("Parts", rf"{ONE_ARRAY}Dict.*: {FLAT}, over FilterObservation if some of its keys are enough{HERE}"),
    ("Pair", rf"{ONE_ARRAY}Tuple.*: {FLAT}{HERE}"),
    ("Missing", "--env-id must be .*: AttributeError: module 'tests.peculiar_envs' has no attribute 'NoSuchClass'"),
]


@networks
@pytest.mark.parametrize(("name", "line"), REFUSED)
def test_a_space_is_refused_with_the_wrapper_that_helps(
    algorithm: str, name: str, line: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    for flags in ([], ["--video-frequency", "8"]):
        with pytest.raises(SystemExit) as stop:
            train(algorithm, f"tests.peculiar_envs:{name}-v0", tmp_path / "run", *flags)
        assert stop.value.code == 2
        assert re.fullmatch(f"error: {line}\n", capfd.readouterr().err)
        assert not (tmp_path / "run").exists()


def test_the_wrappers_that_are_named_help() -> None:
    for name, shape in [("Flat", (1, 84, 84)), ("Gray", (1, 84, 84)), ("ColoursLast", (3, 84, 84)), ("Cells", (147,))]:
        bare = gym.make(f"tests.peculiar_envs:{name}-v0", disable_env_checker=True)
        with pytest.raises(ConfigError) as caught:
            ppo.ActorCritic(bare.observation_space, bare.action_space)
        hint = re.findall(r"put (.*) around it", str(caught.value))[0]
        wrapped = eval(hint, {"gymnasium": gym, "np": np, "env": bare, "Box": gym.spaces.Box})
        assert wrapped.observation_space.shape == shape
        ppo.ActorCritic(wrapped.observation_space, wrapped.action_space)


def test_a_table_that_does_not_fit_is_refused_by_what_makes_it_large(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        run_training("q_learning", *ALGORITHMS["q_learning"][:2], "", ["--env-id", "tests.peculiar_envs:Many-v0"])
    assert stop.value.code == 2
    line = "--env-id must have so few states that a table .* machine's memory, not 10,000,000,000,000: .*Error: .*"
    assert re.fullmatch(f"error: {line}\n", capfd.readouterr().err)


# What docs/environments.md shows


def test_the_documented_environments_are_trained_on_and_evaluated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """MiniGrid's own is replaced by one that shows the same."""
    monkeypatch.syspath_prepend(tmp_path)
    snippets = blocks((ROOT / "docs/environments.md").read_text(), "python")
    assert len(snippets) == 2
    for number, snippet in enumerate(snippets):
        code = snippet.replace("minigrid.envs:EmptyEnv", "tests.peculiar_envs:LikeMiniGrid")
        (tmp_path / f"documented_{number}.py").write_text(code)
        (name,) = re.findall(r'register\(\s*"(.+?)"', snippet)
        for algorithm in ("ppo", "dqn"):
            run_dir = tmp_path / f"{algorithm}-{number}"
            train(algorithm, f"documented_{number}:{name}", run_dir)
            assert evaluate.evaluate(run_dir, episodes=2, device="cpu")["mean_return"] == PLACES - 1
