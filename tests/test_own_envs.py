"""What users' own environments may be like (`tests.own_envs`), with all three algorithms."""

import contextlib
import dataclasses
import functools
import os
import random
import re
import warnings
from collections import deque
from pathlib import Path
from typing import Any

import gymnasium as gym
import mujoco
import numpy as np
import pytest
import torch

from minirl import dqn, ppo, q_learning
from minirl.checks import ConfigError
from minirl.envs.again import played_again
from minirl.envs.guard import OURS, EnvError, Guard, as_taken
from minirl.envs.ids import is_box2d
from minirl.envs.make import make_env, make_vector_env
from minirl.envs.state import CantCapture, OtherPart, capture, decode, encode, restore
from minirl.envs.vector import VectorEnv
from minirl.evaluate import evaluate
from minirl.replay import ReplayBuffer
from minirl.runs import restore_check
from minirl.runs.checkpoints import load_checkpoint, save_checkpoint
from minirl.runs.restore_check import how_a_copy_differs
from minirl.runs.run import seed_everything
from tests.fake_envs import Faulty
from tests.own_envs import (
    EXACT,
    KINDS,
    Born,
    Endless,
    Falls,
    GlobalNumpy,
    Hidden,
    Holds,
    Nested,
    OwnGenerator,
    Samples,
    Shaped,
    Shared,
    Walk,
)
from tests.test_resume import assert_same, train_with_kills

PPO: dict[str, Any] = {
    "num_envs": 4,
    "num_steps": 8,
    "minibatch_size": 16,
    "update_epochs": 1,
    "total_timesteps": 192,
    "checkpoint_frequency": 64,
    "compile": False,
    "num_workers": 1,
}
DQN: dict[str, Any] = {
    "num_envs": 2,
    "total_timesteps": 160,
    "learning_starts": 20,
    "buffer_size": 60,
    "batch_size": 8,
    "train_frequency": 4,
    "checkpoint_frequency": 50,
    "eval_frequency": None,
    "compile": False,
    "num_workers": 1,
}
Q: dict[str, Any] = {"num_episodes": 40, "checkpoint_frequency": 60}
KILLS = {"ppo": 3, "dqn": 60, "q_learning": 30}  # calls of `Run.checkpoint`, of 7, 81 and 41


@pytest.fixture(autouse=True)
def _time_enough(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """To test a copy, also on a busy machine."""
    if "seconds" not in request.fixturenames:
        monkeypatch.setattr(restore_check, "PATIENCE", 60.0)


def config_of(algorithm: str, name: str, **settings: Any) -> tuple[Any, Any]:
    """What trains on an environment of `tests.own_envs`, and its settings."""
    if algorithm == "ppo":
        return ppo.train, ppo.PPOConfig(**{"env_id": f"tests.own_envs:{name}-v0", **PPO, **settings})
    if algorithm == "dqn":
        return dqn.train, dqn.DQNConfig(**{"env_id": f"tests.own_envs:{name}-v0", **DQN, **settings})
    env_id = f"tests.own_envs:{name}Table-v0"
    return q_learning.train, q_learning.QLearningConfig(**{"env_id": env_id, **Q, **settings})


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("algorithm", ["ppo", "dqn", "q_learning"])
def test_a_run_on_numbers_of_numpys_types_can_be_read_again(algorithm: str, kind: str, tmp_path: Path) -> None:
    train, config = config_of(algorithm, f"Pays{kind}")
    train(config, run_dir=tmp_path / "run", device="cpu")
    saved = load_checkpoint(tmp_path / "run", algorithm)
    assert len(saved["returns"]) >= 20
    assert {type(value) for value in saved["returns"]} == {float}
    assert len(evaluate(tmp_path / "run", episodes=2, device="cpu")["returns"]) == 2


@pytest.mark.parametrize("value", [np.dtype(float), [{"seed": Path("home")}], Path("home"), lambda: None])
def test_a_checkpoint_that_cannot_be_read_never_takes_the_place_of_a_good_one(value: Any, tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pt"
    save_checkpoint(path, {"steps": 1, "moments": np.ones(2)})
    good = path.read_bytes()
    with pytest.raises(
        ConfigError, match=r"checkpoint.pt must hold tensors and plain data, and extra\S* is a \w+; the file"
    ):
        save_checkpoint(path, {"steps": 2, "extra": value})
    assert path.read_bytes() == good
    assert list(tmp_path.iterdir()) == [path]


# A killed and resumed run against the same run left alone, which also shows that one seed gives one run.

CASES: list[Any] = [(algorithm, make.__name__, 1) for algorithm in ("ppo", "q_learning") for make in EXACT]
CASES += [("dqn", make.__name__, 1) for make in (OwnGenerator, GlobalNumpy, Holds, Shared, Samples)]
CASES += [("ppo", "GlobalNumpy", 2)]
CASES += [
    pytest.param(*case, 2, marks=pytest.mark.slow)
    for case in (*(("ppo", name) for name in ("GlobalPython", "Shared", "Samples")), ("dqn", "GlobalNumpy"))
]


@pytest.mark.parametrize(("algorithm", "name", "workers"), CASES)
def test_a_resumed_run_is_the_run_left_alone(
    algorithm: str, name: str, workers: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train, config = config_of(algorithm, name, **({} if algorithm == "q_learning" else {"num_workers": workers}))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*new episodes")
        train(config, run_dir=tmp_path / "alone", device="cpu")
        train_with_kills(train, config, tmp_path / "killed", [KILLS[algorithm]], monkeypatch)
    assert_same(load_checkpoint(tmp_path / "alone", algorithm), load_checkpoint(tmp_path / "killed", algorithm))


@pytest.mark.parametrize("name", ["GlobalNumpy", "GlobalPython"])
@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_judging_changes_nothing_of_the_training(workers: int, name: str, tmp_path: Path) -> None:
    for run, every in (("judged", 40), ("alone", None)):
        games = {"eval_frequency": every, "eval_episodes": 2, "confirm_episodes": 2}
        train, config = config_of("dqn", name, num_workers=workers, **games)
        train(config, run_dir=tmp_path / run, device="cpu")
    judged, alone = (load_checkpoint(tmp_path / run, "dqn") for run in ("judged", "alone"))
    for key in ("model", "returns", "random_state", "envs"):
        assert_same(judged[key], alone[key], key)
    assert (tmp_path / "judged" / "best.pt").exists()


# The promise is tested.


@pytest.mark.parametrize("what", ["reward", "observation", "end"])
def test_what_a_copy_does_otherwise_is_named(what: str) -> None:
    found = how_a_copy_differs(functools.partial(Hidden, what=what))
    # Six steps were played before: the luck of the original is 7 at the first, and 10 at the fourth.
    steps = 4 if what == "end" else 1
    assert found == f"a copy of one gave another {what} at step {steps}"
    assert how_a_copy_differs(Walk) == ""


@pytest.mark.parametrize("algorithm", ["ppo", "dqn", "q_learning"])
def test_an_environment_that_hides_its_state_is_said_so_once_and_starts_anew(algorithm: str, tmp_path: Path) -> None:
    for total in (1, 2):
        name = "num_episodes" if algorithm == "q_learning" else "total_timesteps"
        train, config = config_of(algorithm, "Hidden")
        config = dataclasses.replace(config, **{name: total * getattr(config, name)})
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("default", UserWarning)  # as outside of tests: once for each text
            train(config, run_dir=tmp_path / "run", resume=total > 1, device="cpu")
        (text,) = [str(warning.message) for warning in caught if "new episodes" in str(warning.message)]
        assert text == (
            "a resumed run will start new episodes, for these can't be saved: "
            "a copy of one gave another reward at step 1"
        )
    assert load_checkpoint(tmp_path / "run", algorithm)["envs"] is None


@pytest.mark.parametrize("name", ["Walk", "GlobalNumpy", "GlobalPython", "Samples"])
def test_trying_it_out_changes_nothing(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train, config = config_of("ppo", name)
    train(config, run_dir=tmp_path / "tried", device="cpu")
    monkeypatch.setattr("minirl.runs.resume.how_a_copy_differs", lambda make_env: "")
    train(config, run_dir=tmp_path / "trusted", device="cpu")
    assert_same(load_checkpoint(tmp_path / "tried", "ppo"), load_checkpoint(tmp_path / "trusted", "ppo"))


@pytest.mark.parametrize(("seconds", "found"), [(0.02, True), (0.3, False)])
def test_a_slow_environment_is_tried_for_less_than_a_second(
    seconds: float, found: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [0.0]
    monkeypatch.setattr("minirl.runs.restore_check.time.monotonic", lambda: clock[0])
    monkeypatch.setattr("tests.own_envs.time.sleep", lambda seconds: clock.append(clock.pop() + seconds))
    assert bool(how_a_copy_differs(functools.partial(Hidden, seconds=seconds))) == found
    assert 0 < clock[0] < 1


def test_what_cannot_be_made_twice_or_fails_is_left_to_the_training() -> None:
    made: list[Hidden] = []

    def only_one() -> Hidden:
        made.append(Hidden())
        if len(made) > 1:
            raise OSError("the port is taken")
        return made[0]

    assert how_a_copy_differs(only_one) == ""
    assert len(made) == 2
    assert how_a_copy_differs(functools.partial(Faulty, "raise")) == ""


GYMNASIUMS = ("CartPole-v1", "Acrobot-v1", "MountainCar-v0", "FrozenLake-v1", "Taxi-v4", "CliffWalking-v1")
CONTINUOUS = ("Pendulum-v1", "MountainCarContinuous-v0", "Hopper-v5", "HalfCheetah-v5", "Walker2d-v5", "Ant-v5")


@pytest.mark.parametrize(
    "env_id", [*GYMNASIUMS, *CONTINUOUS, "minirl/GridWorld-v0", "PongNoFrameskip-v4", "BreakoutNoFrameskip-v4"]
)
def test_copies_of_known_environments_play_alike(env_id: str) -> None:
    make = functools.partial(make_env, env_id)
    assert how_a_copy_differs(make) == ""
    with contextlib.closing(make()) as env:
        env.reset(seed=0)
        assert capture(env)["kept"] == type(env).__name__


def test_physics_is_put_back_whole() -> None:
    def whole(env: gym.Env[Any, Any]) -> list[Any]:
        core: Any = env.unwrapped
        everything = mujoco.mjtState.mjSTATE_INTEGRATION
        state = np.empty(mujoco.mj_stateSize(core.model, everything))
        mujoco.mj_getState(core.model, core.data, state, everything)
        return [state.tolist(), core.data.time, core.data.xpos.tolist(), core.data.cfrc_ext.tolist()]

    env, other = make_env("Ant-v5"), make_env("Ant-v5")
    env.reset(seed=0)
    for _ in range(9):
        env.step(np.ones(8, np.float32))
    state, expected = capture(env), whole(env)
    assert whole(env) == expected, "it is not changed"
    assert expected[1] > 0
    env.step(np.ones(8, np.float32))
    restore(other, state)
    assert whole(other) == expected, "a copy, and no view of what plays on"


def test_physics_warns_and_writes_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with warnings.catch_warnings(record=True) as seen, contextlib.closing(make_env("HalfCheetah-v5")) as env:
        warnings.simplefilter("always")
        assert not [warning for warning in seen if "MuJoCo" in str(warning.message)], "Gymnasium's models are its own"
        env.reset(seed=0)
        core: Any = env.unwrapped
        core.data.qpos[:] = 1e12
        env.step(np.zeros(6, np.float32))
    assert any("MuJoCo: Nan, Inf or huge value in QPOS" in str(warning.message) for warning in seen)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("start", "dtype"), [(0, np.int64), (0, np.int32), (3, np.int32), (-1, np.int8)])
def test_a_choice_is_a_number_of_its_spaces_dtype(start: int, dtype: Any) -> None:
    space = gym.spaces.Discrete(4, start=start, dtype=dtype)
    actions = [as_taken(space)(choice) for choice in range(4)]
    assert actions == list(range(start, start + 4))
    assert all(space.contains(action) and type(action) is dtype for action in actions)


@pytest.mark.parametrize("draws", [False, True])
def test_an_episode_whose_world_cannot_be_read_is_played_again(draws: bool) -> None:
    """With the random numbers that a wrapper draws from the core's generator."""

    def make(renewed: bool = True) -> gym.Env[Any, Any]:
        env = gym.wrappers.TimeLimit(gym.wrappers.OrderEnforcing(Falls(renewed)), 30)
        return played_again(gym.wrappers.StickyAction(env, 0.5) if draws else env)

    assert how_a_copy_differs(make) == ""
    env, other = make(), make()
    actions = np.random.default_rng(0).uniform(-1, 1, (50, 2))
    env.reset(seed=0)
    for steps in (30, 7):  # an episode, and the beginning of the next, which follows from the generator alone
        for action in actions[:steps]:
            truncated = env.step(action)[3]
        if truncated:
            env.reset()
    if draws:
        env.np_random.random()  # as one that draws after a step
    state = capture(env)
    restore(other, state)
    for _ in range(2):  # put back, it can be captured again
        expected = [env.step(action)[0].item() for action in actions[:5]]
        assert [other.step(action)[0].item() for action in actions[:5]] == expected
        restore(other, capture(env))
    assert [layer.step(actions[0])[3] for layer in [env, other] for _ in range(13)] == [*[False] * 12, True] * 2

    kept = make(renewed=False)
    kept.reset(seed=0)
    with pytest.raises(CantCapture, match=r"Falls\.world is a World"):
        capture(kept)


def test_box2d_is_known_by_where_it_lies() -> None:
    assert [is_box2d(env_id) for env_id in ("LunarLander-v3", "BipedalWalker-v3", "CartPole-v1")] == [True, True, False]


def test_what_a_resumed_episode_would_lose_can_not_be_set() -> None:
    pytest.importorskip("Box2D")
    with make_vector_env("LunarLander-v3", 1) as envs:
        with pytest.raises(AttributeError, match="resumed by playing its episode again, and would lose 'wind_power'"):
            envs.set_attr("wind_power", 0.5)
        envs.set_attr("_max_episode_steps", 5)  # of a wrapper, which is saved


@pytest.mark.parametrize("env_id", ["tests.own_envs:Falls-v0", "LunarLander-v3", "LunarLanderContinuous-v3"])
def test_a_run_is_resumed_within_an_episode_that_is_played_again(
    env_id: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if "Falls" in env_id:
        monkeypatch.setattr("minirl.envs.make.is_box2d", lambda env_id: True)
    else:
        pytest.importorskip("Box2D")
    workers = 2 if env_id == "LunarLander-v3" else 1
    train, config = config_of("ppo", "", env_id=env_id, num_envs=2, num_workers=workers)
    train(config, run_dir=tmp_path / "alone", device="cpu")
    train_with_kills(train, config, tmp_path / "killed", [KILLS["ppo"]], monkeypatch)
    alone, killed = (load_checkpoint(tmp_path / name, "ppo") for name in ("alone", "killed"))
    assert alone["envs"] is not None
    assert_same(alone, killed)


def test_wrappers_that_hold_functions_and_spaces_of_spaces_can_be_captured() -> None:
    def make() -> gym.Env[Any, Any]:
        return gym.wrappers.FlattenObservation(Nested())

    assert how_a_copy_differs(make) == ""
    env = make()
    env.reset(seed=0)
    state, expected = capture(env), env.step(0)[0]
    copy_of_it = make()
    restore(copy_of_it, state)
    np.testing.assert_array_equal(copy_of_it.step(0)[0], expected)


def test_statistics_of_gymnasiums_wrappers_are_captured() -> None:
    def make() -> gym.Env[Any, Any]:
        return gym.wrappers.NormalizeObservation(Walk())

    assert how_a_copy_differs(make) == ""
    env, other = make(), make()
    env.reset(seed=0)
    env.step(1)
    restore(other, capture(env))
    np.testing.assert_array_equal(other.step(1)[0], env.step(1)[0])


@pytest.mark.parametrize(
    ("wrapper", "what"),
    [(gym.wrappers.NormalizeObservation, "observations"), (gym.wrappers.NormalizeReward, "rewards")],
)
def test_statistics_that_evaluation_does_not_have_are_warned_of(wrapper: Any, what: str) -> None:
    gym.register("Normal-v0", lambda **_: wrapper(Walk()))
    try:
        with pytest.warns(UserWarning, match=f"Normal-v0 normalises {what} by statistics of its own"):
            make_env("Normal-v0")
    finally:
        del gym.registry["Normal-v0"]


def add_one(number: float) -> float:
    return number + 1


def add_two(number: float) -> float:
    return number + 2


@pytest.mark.parametrize("workers", [1, 2])
def test_what_is_drawn_while_an_environment_is_made_is_of_the_seed(workers: int) -> None:
    born = []
    for seed in (1, 1, 2):
        seed_everything(seed)
        with VectorEnv(Born, 2, num_workers=workers) as envs:
            born.append(envs.reset(seed=0)[:, 0].tolist())
    assert born[0] == born[1]
    assert len({*born[0], *born[2]}) == 4


LAMBDAS = [lambda: 1, lambda: 2]  # on one line
DEFAULTS = [lambda number=number: number for number in range(2)]


@pytest.mark.parametrize(("thing", "other"), [(add_one, add_two), (Walk, Endless), (add_one, 1), LAMBDAS, DEFAULTS])
def test_another_function_or_class_is_not_taken_for_the_one_that_was_there(thing: Any, other: Any) -> None:
    env: Any = Walk()
    env.thing = thing
    state = capture(env)
    again: Any = Walk()
    again.thing = thing
    restore(again, state)
    assert again.thing is thing
    again.thing = other
    with pytest.raises(OtherPart, match=r"the environment was made of a .*, and is now of a"):
        restore(again, state)


@pytest.mark.parametrize(("algorithm", "workers"), [("ppo", 1), ("ppo", 2), ("dqn", 1), ("q_learning", 1)])
def test_environments_that_cannot_be_put_back_start_new_episodes_and_a_line_says_why(
    algorithm: str, workers: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    cuts: list[int] = []
    cut = ReplayBuffer.cut
    monkeypatch.setattr(ReplayBuffer, "cut", lambda memory: cuts.append(cut(memory) or 1))
    name = "num_episodes" if algorithm == "q_learning" else "total_timesteps"
    train, config = config_of(algorithm, "Changes")
    if algorithm == "ppo":
        config = dataclasses.replace(config, num_envs=2, num_workers=workers)
    train(config, run_dir=tmp_path / "run", device="cpu")
    config = dataclasses.replace(config, **{name: 2 * getattr(config, name)})
    train(config, run_dir=tmp_path / "run", resume=True, device="cpu")
    line = "can't be put back, and start new episodes: the environment was made of a function late"
    assert line in capfd.readouterr().err
    assert cuts == [1] * (algorithm == "dqn")


def test_a_mistake_in_a_wrapper_of_this_package_comes_with_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("minirl.envs.guard.MINIRL", f"{Path(__file__).parent}{os.sep}")
    monkeypatch.setattr("minirl.envs.guard.OURS", (*OURS, f"{Path(__file__).parent}{os.sep}"))
    guard = Guard(Shaped(Walk()))
    guard.reset(seed=0)
    with pytest.raises(EnvError, match="no attribute 'penalty'") as caught:
        guard.step(0)
    assert re.findall(r'File ".*/(\w+).py".* in (\w+)', caught.value.trace)[-1] == ("own_envs", "reward")


def test_what_fails_when_it_is_closed_is_warned_of(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Walk, "close", lambda self: [][0])
    envs = VectorEnv(Walk, 2)
    with pytest.warns(UserWarning, match=r"environment 0 .* can't be closed: IndexError: list index out of range"):
        envs.close()


def test_what_cannot_be_captured_is_named() -> None:
    endless: list[Any] = []
    for _ in range(10**5):
        endless = [endless]
    for thing, message in (
        (object(), "Walk.thing is a object"),
        ([1, (b"", {2: 3j})], "Walk.thing is a complex"),
        (np.array([None]), "Walk.thing is a ndarray"),
        (endless, "Walk raises RecursionError"),
    ):
        env: Any = Walk()
        env.thing = thing
        with pytest.raises(CantCapture, match=message):
            capture(env)


# Values


def test_what_is_shared_is_shared_again(tmp_path: Path) -> None:
    board = np.asfortranarray(np.arange(12.0).reshape(3, 4))
    things: list[Any] = [board, board[1], board.T, {"corner": board[2:, 3:]}, np.int8(3), b"no", deque([1, 2], 2)]
    things += [(things, board), np.arange(6)[::-2], {frozenset({2})}, np.random.default_rng(3), random.Random(3)]
    save_checkpoint(tmp_path / "file.pt", {"things": encode(things)})
    saved = torch.load(tmp_path / "file.pt", weights_only=True)
    made = decode(saved["things"])
    np.testing.assert_array_equal(made[0], board)
    assert made[0].strides == board.strides, "sums go in the same order"
    made[1][3] = 40.0
    made[3]["corner"] += 2
    expected = np.arange(12.0).reshape(3, 4)
    expected[1, 3], expected[2, 3] = 40, 13
    np.testing.assert_array_equal(made[0], expected)
    np.testing.assert_array_equal(made[2], expected.T)
    assert made[7][0] is made
    assert made[7][1] is made[0]
    assert (made[4], type(made[4]), made[5], made[6], made[6].maxlen) == (3, np.int8, b"no", deque([1, 2]), 2)
    assert (made[8].tolist(), made[9]) == ([5, 3, 1], {frozenset({2})})
    assert (made[10].random(), made[11].random()) == (things[10].random(), things[11].random())


def test_of_a_large_array_only_the_part_that_is_held_is_saved() -> None:
    large = np.zeros((1000, 1000))
    first, second = encode([large[0], large[500:, 999]])
    assert (first["array"].nbytes, second["array"].nbytes) == (8000, 4000)
