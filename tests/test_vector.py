"""Many environments at once: what a step reports, and how workers live and die."""

import contextlib
import functools
import multiprocessing
import os
import pickle
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch

from minirl.envs import vector, workers
from minirl.envs.make import make_env, make_vector_env
from minirl.envs.state import CantRestore
from minirl.envs.vector import EnvError, Episode, VectorEnv, WorkerError, available_cores
from minirl.ppo import PPOConfig, train
from tests.fake_envs import EndsInReset, Faulty, Stuck, TorchDetector, Unmakable, counter

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("num_workers", [1, 2, pytest.param(3, marks=pytest.mark.slow)])
@pytest.mark.parametrize(("ends_at", "cut_at"), [(2, None), (None, 2), (2, 2)])
def test_an_end_resets_in_the_same_step_and_keeps_the_last_observation(
    num_workers: int, ends_at: int | None, cut_at: int | None
) -> None:
    with VectorEnv(functools.partial(counter, ends_at, cut_at), 3, num_workers=num_workers) as envs:
        first = envs.reset(seed=10)
        # (episode, step, seed, last action) of each environment
        assert first.tolist() == [[0, 0, 10, -1], [0, 0, 11, -1], [0, 0, 12, -1]]

        step = envs.step(np.array([0, 1, 0]))
        assert step.observations.tolist() == [[0, 1, 10, 0], [0, 1, 11, 1], [0, 1, 12, 0]]
        assert step.rewards.tolist() == [1, 1, 1]
        assert not step.terminated.any()
        assert not step.truncated.any()
        assert step.episodes == []

        step = envs.step(np.array([1, 1, 0]))
        assert step.final_observations.tolist() == [[0, 2, 10, 1], [0, 2, 11, 1], [0, 2, 12, 0]]
        assert step.observations.tolist() == [[1, 0, 10, 1], [1, 0, 11, 1], [1, 0, 12, 0]]
        assert step.rewards.tolist() == [2, 2, 2]
        assert step.terminated.tolist() == [ends_at == 2] * 3
        assert step.truncated.tolist() == [cut_at == 2] * 3
        assert step.episodes == [Episode(i, 3.0, 2) for i in range(3)]

        step = envs.step(np.array([0, 0, 0]))
        assert not step.terminated.any()
        assert not step.truncated.any()
        assert step.observations[:, :2].tolist() == [[1, 1]] * 3


@pytest.mark.parametrize("num_workers", [1, 2])
def test_an_attribute_is_set_wherever_the_environment_is(num_workers: int) -> None:
    with VectorEnv(counter, 4, num_workers=num_workers, in_halves=True) as envs:
        envs.reset()
        envs.set_attr("ends_at", 1)
        assert envs.step(np.zeros(4, np.int64)).terminated.all()
        with pytest.raises(AttributeError, match="has no attribute 'level'"):
            envs.set_attr("level", 1)
        assert envs.step(np.zeros(4, np.int64)).terminated.all(), "workers go on"
        envs.start(envs.halves[0], np.zeros(2, np.int64))
        with pytest.raises(RuntimeError, match="these environments are playing: finish them first"):
            envs.set_attr("ends_at", 2)


def test_actions_count_from_zero_whatever_the_space_does() -> None:
    with VectorEnv(functools.partial(counter, start=5), 2, num_workers=1) as envs:
        envs.reset()
        assert envs.step(np.array([0, 1])).observations[:, 3].tolist() == [5, 6]


def rollout(envs: VectorEnv, num_steps: int) -> list[Any]:
    rng = np.random.default_rng(0)
    record: list[Any] = [envs.reset(seed=3).copy()]
    for _ in range(num_steps):
        step = envs.step(rng.integers(4, size=envs.num_envs))
        ended = step.terminated | step.truncated
        record += [array.copy() for array in step[:4]]
        record += [step.final_observations[ended].copy(), step.episodes]
    return record


def test_workers_give_the_same_games_as_this_process() -> None:
    make = functools.partial(make_env, "BreakoutNoFrameskip-v4")
    with VectorEnv(make, 3, num_workers=1) as envs:
        expected = rollout(envs, 50)
    with VectorEnv(make, 3, num_workers=2) as envs:
        assert multiprocessing.active_children(), "there must be workers"
        actual = rollout(envs, 50)
    assert any(record.any() for record in expected[3::6]), "lives must be lost on the way"
    for one, other in zip(expected, actual, strict=True):
        np.testing.assert_equal(one, other)
    assert not multiprocessing.active_children()


def test_workers_hold_several_environments_and_no_torch() -> None:
    assert sys.modules["torch"] is torch, "the training process has it"
    with VectorEnv(TorchDetector, 6, num_workers=3) as envs:
        obs = envs.reset()
    assert obs[:, 0].tolist() == [1, 1, 0, 0, 0, 0]
    processes = obs[:, 1].tolist()
    assert processes[0] == processes[1] == os.getpid() % 2**20, "this process plays, too"
    assert len({processes[0], processes[2], processes[4]}) == 3
    assert processes[2] == processes[3]
    assert processes[4] == processes[5]


def test_the_number_of_workers_follows_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vector, "available_cores", lambda: 3)
    with VectorEnv(counter, 2) as envs:
        assert envs.num_workers == 2, "never more than environments"
    with make_vector_env("PongNoFrameskip-v4", 4) as envs:
        assert envs.num_workers == 3
        assert envs.reset().shape == (4, 4, 84, 84)
    with make_vector_env("CartPole-v1", 8) as envs:
        assert envs.num_workers == 1, "a message costs more than a step"
    monkeypatch.setattr(vector, "available_cores", lambda: 1)
    with make_vector_env("PongNoFrameskip-v4", 2) as envs:
        assert envs.num_workers == 1
        assert not multiprocessing.active_children()


@pytest.mark.parametrize("num_workers", [1, 2, *(pytest.param(number, marks=pytest.mark.slow) for number in (3, 9))])
def test_halves_play_in_turn_and_each_environment_its_own_actions(num_workers: int) -> None:
    with VectorEnv(functools.partial(counter, 2), 5, num_workers=num_workers, in_halves=True) as envs:
        assert envs.num_workers == min(num_workers, 3), "two workers have all of the smaller half to play"
        assert len(multiprocessing.active_children()) == envs.num_workers - 1
        first, second = envs.halves
        assert (first, second) == (slice(0, 2), slice(2, 5))
        assert envs.reset(seed=10)[:, 2].tolist() == [10, 11, 12, 13, 14]
        envs.start(first, np.array([1, 0]))
        envs.start(second, np.array([0, 1, 1]))
        step = envs.finish(first)
        assert step.observations.tolist() == [[0, 1, 10, 1], [0, 1, 11, 0]]
        envs.start(first, np.array([0, 1]))
        step = envs.finish(second)
        assert step.observations.tolist() == [[0, 1, 12, 0], [0, 1, 13, 1], [0, 1, 14, 1]]
        assert step.rewards.tolist() == [1, 1, 1]
        step = envs.finish(first)
        assert step.terminated.tolist() == [True, True]
        assert step.final_observations.tolist() == [[0, 2, 10, 0], [0, 2, 11, 1]]
        assert step.episodes == [Episode(0, 3.0, 2), Episode(1, 3.0, 2)]
        whole = envs.step(np.zeros(5, np.int64))
        assert whole.observations[:, :2].tolist() == [[1, 1], [1, 1], [1, 0], [1, 0], [1, 0]]
        assert whole.terminated.tolist() == [False, False, True, True, True]
        assert [episode.env_index for episode in whole.episodes] == [2, 3, 4]
        states = envs.capture()
        expected = envs.step(np.ones(5, np.int64)).observations.copy()
    with VectorEnv(functools.partial(counter, 2), 5, num_workers=1) as envs:
        envs.restore(states)
        np.testing.assert_array_equal(envs.step(np.ones(5, np.int64)).observations, expected)


@pytest.mark.parametrize("in_halves", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_states_of_environments_made_otherwise_are_refused(in_halves: bool) -> None:
    with VectorEnv(counter, 4, num_workers=2, in_halves=in_halves) as envs:
        envs.reset(seed=0)
        saved = envs.capture()
    *others, last = saved["states"]
    more, inner = {**last, "parts": {**last["parts"], "cap": 1}}, last["parts"]["env"]
    for states, message in (
        ([*others, more], "EpisodeStatistics has no cap any more"),
        ([*others, inner], "the environment was made of a Counter, and is now of a EpisodeStatistics"),
        (others, "3 saved states for 4"),
    ):
        with (
            VectorEnv(counter, 4, num_workers=2, in_halves=in_halves) as envs,
            pytest.raises(CantRestore, match=message),
        ):
            envs.restore({**saved, "states": states})


def test_halves_can_only_be_finished_as_they_were_started() -> None:
    with VectorEnv(counter, 4, num_workers=2, in_halves=True) as envs:
        envs.reset(seed=0)
        first, second = envs.halves
        with pytest.raises(RuntimeError, match="not started"):
            envs.finish(first)
        envs.start(first, np.array([1, 0]))
        with pytest.raises(RuntimeError, match="started already"):
            envs.start(first, np.array([1, 0]))
        envs.start(second, np.array([1, 0]))
        with pytest.raises(RuntimeError, match="others before them"):
            envs.finish(second)
        assert envs.finish(first).observations[:, 3].tolist() == [1, 0]
        assert envs.finish(second).observations[:, 1].tolist() == [1, 1]


def test_one_environment_has_no_halves_and_only_atari_is_played_in_them() -> None:
    with VectorEnv(counter, 1, in_halves=True) as envs:
        assert envs.halves == [slice(0, 1)]
    with make_vector_env("CartPole-v1", 4, in_halves=True) as envs:
        assert envs.halves == [slice(0, 4)]


def test_what_takes_long_is_played_by_all_cores_where_nobody_says_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int | None] = []
    monkeypatch.setattr("minirl.envs.make.VectorEnv", lambda make, number, **how: made.append(how["num_workers"]))
    slow = ("PongNoFrameskip-v4", 1), ("HalfCheetah-v5", 1), ("LunarLander-v3", slice(4, 8)), ("Acrobot-v1", 4)
    for env_id, number in (*slow, ("CartPole-v1", 8), ("Pendulum-v1", 8), ("LunarLander-v3", 3), ("Acrobot-v1", 3)):
        make_vector_env(env_id, number)
        make_vector_env(env_id, number, num_workers=2)
    assert made == [*[None, 2] * 4, *[1, 2] * 4]


class OnlyInWorkers:
    """Makes a sound environment in this process, and another kind in others."""

    def __init__(self, make: Callable[[], gym.Env[Any, Any]]) -> None:
        self.make = make
        self.here = os.getpid()

    def __call__(self) -> gym.Env[Any, Any]:
        return counter() if os.getpid() == self.here else self.make()


def step_until_it_fails(make: Callable[[], gym.Env[Any, Any]]) -> None:
    with VectorEnv(OnlyInWorkers(make), 4, num_workers=2) as envs:
        envs.reset()
        for _ in range(3):
            envs.step(np.zeros(4, np.int64))


def test_a_worker_that_dies_ends_the_run() -> None:
    with pytest.raises(WorkerError, match=r"environments 2 to 3.*died without an answer, exit code -9$"):
        step_until_it_fails(functools.partial(Faulty, "die"))
    assert not multiprocessing.active_children()


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("raise", "ArithmeticError: the pole snapped"),
        ("exit", "SystemExit: 3"),
        pytest.param("hang up", "EOFError: the game server .*", marks=pytest.mark.slow),
    ],
)
def test_what_an_environment_raises_in_a_worker_comes_with_its_own_traceback(fault: str, message: str) -> None:
    with pytest.raises(EnvError, match=f"environment 2 .*, at its step 3, raised {message}$") as caught:
        step_until_it_fails(functools.partial(Faulty, fault))
    header, frame, code, *rest = caught.value.trace.splitlines()
    assert header == "Traceback (most recent call last):"
    assert "fake_envs.py" in frame
    assert "raise " in code or "sys.exit(" in code
    assert re.fullmatch(message, rest[-1])
    assert caught.value.trace.count("File ") == 1, "nothing of ours"
    assert caught.value.trace in str(caught.value.__cause__), "for those who do not print it themselves"
    assert not multiprocessing.active_children()


def test_a_worker_that_dies_between_steps_is_noticed() -> None:
    with VectorEnv(counter, 2, num_workers=2) as envs:
        envs.reset()
        victim = multiprocessing.active_children()[0]
        assert victim.pid is not None
        os.kill(victim.pid, signal.SIGKILL)
        victim.join()
        with pytest.raises(WorkerError, match="exit code -9"):
            envs.step(np.zeros(2, np.int64))


def test_a_worker_that_cannot_make_its_environments_says_why() -> None:
    with pytest.raises(WorkerError, match="FileNotFoundError: no such level"):
        VectorEnv(OnlyInWorkers(Unmakable), 2, num_workers=2)
    assert not multiprocessing.active_children()


@pytest.mark.parametrize("num_workers", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_closing_twice_is_safe_and_stepping_then_is_not(num_workers: int) -> None:
    envs = VectorEnv(counter, 2, num_workers=num_workers)
    envs.reset()
    envs.close()
    envs.close()
    assert not multiprocessing.active_children()
    with pytest.raises(RuntimeError, match="closed"):
        envs.step(np.zeros(2, np.int64))
    with pytest.raises(RuntimeError, match="closed"):
        envs.reset()


@pytest.mark.parametrize("delay", [0.0, 0.5])
def test_a_message_is_heard_at_once_or_late_and_waiting_costs_no_processor(delay: float) -> None:
    ours, theirs = multiprocessing.Pipe()
    threading.Timer(delay, theirs.send_bytes, [pickle.dumps("step")]).start()
    busy = time.process_time()
    assert workers._hear(ours) == "step"
    assert time.process_time() - busy < 0.1
    theirs.close()
    with pytest.raises(EOFError):
        workers._hear(ours)


@pytest.mark.slow
def test_a_worker_that_is_stuck_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "PATIENCE", 0.2)
    envs = VectorEnv(Stuck, 3, num_workers=3)
    envs.reset()
    for worker in envs._workers:
        worker.send(("step", 0))
    processes = multiprocessing.active_children()
    assert len(processes) == 2
    envs.close()
    assert [worker.exitcode for worker in processes] == [-signal.SIGKILL] * 2


def test_an_episode_that_ends_in_a_reset_is_counted() -> None:
    with VectorEnv(EndsInReset, 1, num_workers=1) as envs:
        envs.reset()
        assert envs.step(np.array([0])).episodes == [Episode(0, 1.0, 1)] * 2
        assert envs.step(np.array([0])).episodes == [Episode(0, 1.0, 1)] * 2, "each is told once"


def pids_of_session(session: int) -> list[int]:
    pids = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # gone meanwhile
            state, _, _, its_session = stat.read_text().rpartition(")")[2].split()[:4]
            if int(its_session) == session and state != "Z":
                pids.append(int(stat.parent.name))
    return pids


def wait_until_no_process_is_left(session: int) -> None:
    """Wait until they are gone; `_no_test_hangs` ends a test that would wait for ever."""
    while pids_of_session(session):
        time.sleep(0.1)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "to_group", "status"),
    [(signal.SIGINT, True, 130), (signal.SIGTERM, True, 143), (signal.SIGTERM, False, 143)],
)
def test_a_stopped_training_saves_and_leaves_no_process(
    tmp_path: Path, number: signal.Signals, to_group: bool, status: int
) -> None:
    command = "train_ppo.py --env-id CartPole-v1 --num-workers 2 --num-steps 32 --minibatch-size 64 --run-dir"
    run_dir = tmp_path / "run"
    process = subprocess.Popen(
        [sys.executable, *command.split(), str(run_dir)],
        cwd=ROOT,
        start_new_session=True,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    while " of 10,000,128 steps" not in process.stderr.readline():
        assert process.poll() is None
    children = [pid for pid in pids_of_session(process.pid) if pid != process.pid]
    assert len(children) >= 2, "there must be a worker, and what starts it"
    for pid in children:
        assert "libtorch" not in Path(f"/proc/{pid}/maps").read_text(), "though they load train_ppo.py"
    saved_before = (run_dir / "checkpoint.pt").stat().st_mtime_ns
    (os.killpg if to_group else os.kill)(process.pid, number)
    _, errors = process.communicate()
    assert (process.returncode, "Traceback" in errors) == (status, False), errors
    assert (run_dir / "checkpoint.pt").stat().st_mtime_ns > saved_before
    wait_until_no_process_is_left(process.pid)


SCRIPT = """
import sys, time
from minirl.envs.vector import VectorEnv
from tests.fake_envs import counter
if __name__ == "__main__":
    envs = VectorEnv(counter, 2, num_workers=2)
    print("ready", flush=True)
    time.sleep(float(sys.argv[1]))
"""


def start_script(tmp_path: Path, *arguments: str) -> subprocess.Popen[str]:
    file = tmp_path / "script.py"
    file.write_text(SCRIPT)
    process = subprocess.Popen(
        [sys.executable, str(file), *arguments],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        start_new_session=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def test_a_script_from_standard_input_is_told_why_it_has_no_workers() -> None:
    code = "import minirl.envs.make as m; m.make_vector_env('CartPole-v1', 2, num_workers=2)"
    result = subprocess.run([sys.executable], input=code, capture_output=True, text=True, cwd=ROOT)
    message = "--num-workers must be 1 for a script from standard input: workers load it from a file"
    assert result.stderr.splitlines()[-1] == f"minirl.checks.ConfigError: {message}"


def test_a_script_that_trains_wherever_it_is_loaded_is_told_so(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(
        "import minirl.envs.make as m\nm.make_vector_env('CartPole-v1', 2, num_workers=2)"
    )
    command, env = [sys.executable, str(tmp_path / "script.py")], {**os.environ, "PYTHONPATH": str(ROOT)}
    lines = subprocess.run(command, env=env, capture_output=True, text=True).stderr.splitlines()
    message = '--num-workers must be 1, or a script train below `if __name__ == "__main__":`: workers load it, too'
    assert f"minirl.checks.ConfigError: {message}" in lines
    assert lines[-1].endswith("died without an answer, exit code 1; its own error is above")


@pytest.mark.slow
def test_workers_leave_when_the_training_process_is_killed(tmp_path: Path) -> None:
    process = start_script(tmp_path, "60")
    process.kill()
    process.communicate()
    wait_until_no_process_is_left(process.pid)


@pytest.mark.slow
def test_workers_leave_when_a_script_ends_without_closing(tmp_path: Path) -> None:
    process = start_script(tmp_path, "0")
    process.communicate()
    assert process.returncode == 0
    wait_until_no_process_is_left(process.pid)


@pytest.mark.slow
def test_evaluation_workers_have_no_torch_either(tmp_path: Path) -> None:
    config = PPOConfig(num_envs=1, num_steps=4, minibatch_size=4, total_timesteps=4, update_epochs=1)
    train(config, run_dir=tmp_path / "run", device="cpu")
    process = subprocess.Popen(
        [sys.executable, "-m", "minirl.evaluate", str(tmp_path / "run")], cwd=ROOT, start_new_session=True
    )
    # Pong games take a while: the workers play until they are killed.
    while len(pids_of_session(process.pid)) < 1 + available_cores():
        assert process.poll() is None
        time.sleep(0.1)
    time.sleep(3)
    for pid in pids_of_session(process.pid):
        assert pid == process.pid or "libtorch" not in Path(f"/proc/{pid}/maps").read_text()
    process.kill()
    process.communicate()
    wait_until_no_process_is_left(process.pid)


def test_what_float32_can_not_hold_is_the_environments_fault() -> None:
    wide = gym.spaces.Box(-np.inf, np.inf, (2,), np.float64)

    def huge() -> gym.Env[Any, Any]:
        return gym.wrappers.TransformObservation(counter(), lambda obs: np.array([0.0, -1e39]), wide)

    with (
        VectorEnv(huge, 1, num_workers=1) as envs,
        pytest.raises(EnvError, match=r"in its first reset, gave an observation beyond float32's 3.4e\+38"),
    ):
        envs.reset()


class Misbehaving(gym.Wrapper[Any, Any, Any, Any]):
    """Does something wrong at its third step."""

    def __init__(self, fault: str) -> None:
        super().__init__(counter())
        self.fault = fault
        self.steps = 0

    def step(self, action: int) -> Any:
        self.steps += 1
        obs, reward, *rest = self.env.step(action)
        if self.steps == 3:
            if self.fault == "raise":
                raise ArithmeticError("the pole snapped")
            if self.fault == "shape":
                obs = obs[:1]
            if self.fault == "nan":
                obs = np.where(obs == 3, np.nan, obs)
            if self.fault == "inf":
                reward = float("inf")
        return obs, reward, *rest


@pytest.mark.parametrize(
    ("fault", "what"),
    [
        ("raise", "raised ArithmeticError: the pole snapped"),
        ("shape", r"showed an observation of shape \(1,\), not \(4,\)"),
        ("nan", "gave an observation that is not finite"),
        ("inf", "gave a reward that is not finite"),
    ],
)
@pytest.mark.parametrize("num_workers", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_what_cannot_be_learned_from_is_an_error_that_names_environment_and_step(
    fault: str, what: str, num_workers: int
) -> None:
    bad = functools.partial(Misbehaving, fault)
    if num_workers == 1:
        makers: Iterator[Callable[[], Any]] = iter([counter, bad])  # the second environment is the one that fails
        envs = VectorEnv(lambda: next(makers)(), 2, num_workers=1)
    else:
        envs = VectorEnv(OnlyInWorkers(bad), 2, num_workers=2)
    with envs:
        envs.reset()
        for _ in range(2):
            envs.step(np.zeros(2, np.int64))
        with pytest.raises(EnvError, match=rf"environment 1 \(without an id\), at its step 3, {what}"):
            envs.step(np.zeros(2, np.int64))
