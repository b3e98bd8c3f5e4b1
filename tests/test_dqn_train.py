"""Training Double DQN as a whole: what is remembered, when it is updated, and that it learns."""

import copy
import dataclasses
import functools
import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from minirl.checks import ConfigError
from minirl.dqn import (
    Clock,
    DQNConfig,
    QNetwork,
    TargetUpdate,
    epsilon_greedy,
    expected_steps,
    gradient_step,
    train,
)
from minirl.envs.make import make_vector_env
from minirl.envs.vector import VectorEnv
from minirl.evaluate import evaluate
from minirl.evaluate import main as evaluate_main
from minirl.replay import ReplayBuffer
from minirl.results.play import Evaluator
from minirl.runs.checkpoints import BEST_FILE, load_checkpoint
from minirl.runs.losses import RecentLosses
from minirl.runs.run import Run
from minirl.scripts.train import run_training
from tests.fake_envs import counter
from tests.scalars import read_scalars
from tests.weights import parameters

CPU = torch.device("cpu")
TINY = DQNConfig(
    env_id="tests.fake_envs:Reseeded-v0",  # episodes of 7 steps
    total_timesteps=60,
    learning_starts=20,
    buffer_size=50,
    batch_size=4,
    eval_frequency=25,
    eval_episodes=2,
    confirm_episodes=3,
    checkpoint_frequency=1000,
)
SMALL_PONG = DQNConfig(
    env_id="PongNoFrameskip-v4",
    total_timesteps=40,
    learning_starts=33,
    train_frequency=4,
    buffer_size=1000,
    batch_size=8,
    learning_rate=1e-4,
    anneal_lr=False,
    target_network_frequency=40,
    tau=1.0,
    eval_frequency=None,
)


# What is remembered


def test_the_successor_of_an_end_is_the_last_observation_and_not_the_next_start() -> None:
    with VectorEnv(functools.partial(counter, None, 2), 2, num_workers=1) as envs:  # cut after 2 steps
        envs.reset(seed=5)
        first = envs.step(np.array([0, 1]))
        assert first.next_observations()[:, :2].tolist() == [[0, 1], [0, 1]]
        second = envs.step(np.array([0, 1]))
        assert second.next_observations().tolist() == [[0, 2, 5, 0], [0, 2, 6, 1]]
        assert second.observations[:, :2].tolist() == [[1, 0], [1, 0]]


def test_only_the_environment_that_ended_takes_its_final_observation() -> None:
    with VectorEnv(functools.partial(counter, 2), 2, num_workers=1) as envs:
        envs.reset(seed=0)
        step = envs.step(np.array([0, 0]))
        mixed = step._replace(truncated=np.array([False, True]), final_observations=step.observations + 10)
        assert np.array_equal(mixed.next_observations()[0], step.observations[0])
        assert np.array_equal(mixed.next_observations()[1], step.observations[1] + 10)


@pytest.mark.parametrize("env_id", ["tests.fake_envs:Counter-v0", "tests.fake_envs:Endless-v0"])
@pytest.mark.parametrize("num_envs", [1, 2])
def test_training_remembers_what_happened(env_id: str, num_envs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[tuple[NDArray[Any], ...]] = []

    class Spy(ReplayBuffer):
        def add(self, *arrays: NDArray[Any]) -> None:
            rows.append(tuple(array.copy() for array in arrays))
            super().add(*arrays)

    monkeypatch.setattr("minirl.dqn.ReplayBuffer", Spy)
    train(dataclasses.replace(TINY, env_id=env_id, num_envs=num_envs), device="cpu")
    assert len(rows) == 60 / num_envs
    ends_at, terminates = (7, True) if "Counter" in env_id else (5, False)
    for t, (obs, actions, rewards, next_obs, terminated, truncated) in enumerate(rows):
        episode, count = divmod(t, ends_at)
        for env in range(num_envs):
            # (episode, step, seed, last action)
            assert obs[env, :3].tolist() == [episode, count, TINY.seed + env]
            assert next_obs[env].tolist() == [episode, count + 1, TINY.seed + env, actions[env]]
            assert rewards[env] == count + 1
            ended = count + 1 == ends_at
            assert (terminated[env], truncated[env]) == (ended and terminates, ended and not terminates)


# Training


class Calls:
    """What a training did at which step."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, config: DQNConfig) -> None:
        self.updates: list[int] = []
        self.targets: list[int] = []
        self.rates: list[float] = []
        self.modes = (False, False)
        self.added = 0
        add, update_target = ReplayBuffer.add, TargetUpdate.update

        def spy_add(buffer: ReplayBuffer, *arrays: Any) -> None:
            self.added += config.num_envs
            add(buffer, *arrays)

        def spy_step(*arguments: Any) -> dict[str, Tensor]:
            assert len(arguments[-1].rewards) == config.batch_size
            self.updates.append(self.added)
            self.rates.append(arguments[2].param_groups[0]["lr"])
            self.modes = arguments[0].training, arguments[1].training
            return gradient_step(*arguments)

        def spy_target(target: TargetUpdate) -> None:
            self.targets.append(self.added)
            update_target(target)

        monkeypatch.setattr(ReplayBuffer, "add", spy_add)
        monkeypatch.setattr("minirl.dqn.gradient_step", spy_step)
        monkeypatch.setattr(TargetUpdate, "update", spy_target)
        train(config, device="cpu")


def test_updates_come_after_the_start_and_as_often_as_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = Calls(monkeypatch, dataclasses.replace(TINY, train_frequency=8, target_network_frequency=15))
    assert calls.updates == [24, 32, 40, 48, 56]
    assert calls.targets == [15, 30, 45, 60]
    assert calls.modes == (True, False), "of the online and the target network"
    several = Calls(monkeypatch, dataclasses.replace(TINY, train_frequency=16, gradient_steps=3))
    assert several.updates == [*[32] * 3, *[48] * 3]


def test_several_environments_do_not_change_the_number_of_updates(monkeypatch: pytest.MonkeyPatch) -> None:
    config = dataclasses.replace(TINY, num_envs=5, train_frequency=2, learning_starts=40)
    calls = Calls(monkeypatch, config)
    # 5 steps at a time: 36, 38 and 40 are due at 40; 42 and 44 at 45; 46, 48 and 50 at 50; and so on
    assert calls.updates == [*[40] * 3, *[45] * 2, *[50] * 3, *[55] * 2, *[60] * 3]


def test_no_update_before_the_memory_holds_a_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = Calls(monkeypatch, dataclasses.replace(TINY, learning_starts=0, batch_size=30))
    assert calls.updates[0] == 30


def test_the_learning_rate_falls_to_zero_if_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    config = dataclasses.replace(TINY, learning_starts=30, train_frequency=10, learning_rate=0.6, anneal_lr=True)
    assert Calls(monkeypatch, config).rates == pytest.approx([0.31, 0.21, 0.11, 0.01])
    constant = dataclasses.replace(config, anneal_lr=False)
    assert Calls(monkeypatch, constant).rates == pytest.approx([0.6] * 4)


def test_the_target_moves_as_often_with_several_environments(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = Calls(monkeypatch, dataclasses.replace(TINY, num_envs=5, target_network_frequency=2, total_timesteps=50))
    assert len(calls.targets) == 25


def test_actions_are_explored_as_the_schedule_says(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def spy(q_values: NDArray[np.float32], epsilon: float, rng: np.random.Generator) -> NDArray[np.int64]:
        assert q_values.shape == (2, 2)
        seen.append(epsilon)
        return epsilon_greedy(q_values, epsilon, rng)

    monkeypatch.setattr("minirl.dqn.epsilon_greedy", spy)
    config = dataclasses.replace(TINY, num_envs=2, start_epsilon=0.9, end_epsilon=0.3, exploration_fraction=0.5)
    train(config, device="cpu")
    expected = [max(0.3, 0.9 - 0.02 * step) for step in range(0, 60, 2)]
    assert seen == pytest.approx(expected)


def test_training_does_not_explore_with_the_random_numbers_of_its_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    generators = []

    class Spy(ReplayBuffer):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            generators.append(copy.deepcopy(options["seed"]))
            super().__init__(*arguments, **options)

    monkeypatch.setattr("minirl.dqn.ReplayBuffer", Spy)
    train(TINY, device="cpu")
    assert generators[0].random() != np.random.default_rng(TINY.seed).random()


def test_logged_losses_are_the_means_since_the_last_time() -> None:
    losses = RecentLosses(torch.device("cpu"))
    assert losses.means() == {}
    for td_loss, own in ((1.0, 20.0), (3.0, 60.0)):
        losses.append({"td_loss": torch.tensor(td_loss), "own": torch.tensor(own)})
    assert losses.means() == {"losses/td_loss": 2.0, "losses/own": 40.0}
    assert losses.means() == {}


def test_each_log_point_has_its_own_losses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("minirl.dqn.LOG_EVERY", 30)
    monkeypatch.setattr(
        "minirl.dqn.gradient_step",
        lambda online, target, optimizer, *_: {"td_loss": torch.tensor(optimizer.param_groups[0]["lr"])},
    )
    config = dataclasses.replace(TINY, anneal_lr=True, learning_rate=60.0, train_frequency=10, eval_frequency=None)
    train(config, run_dir=tmp_path / "run", device="cpu")
    # Updates at 20, 30, 40, 50 and 60, at the rates of the steps before: 41, 31, 21, 11 and 1
    assert read_scalars(tmp_path / "run")["losses/td_loss"] == [(30, 36.0), (60, 11.0)]


def test_a_run_can_end_by_episodes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = dataclasses.replace(TINY, num_episodes=5, target_network_episodes=2, eval_frequency=None)
    train(config, run_dir=tmp_path / "run", device="cpu")
    saved = load_checkpoint(tmp_path / "run", "dqn")
    assert (saved["global_step"], saved["episodes"]) == (35, 5)
    assert saved["returns"] == [28.0] * 5
    last_line = capsys.readouterr().err.splitlines()[-1]
    assert last_line.startswith("35 of 35 steps, ")
    assert last_line.endswith(" 0:00:00 left, mean return 28.0 (last 5)")


def test_the_end_of_a_run_by_episodes_is_foreseen_from_their_length() -> None:
    config = dataclasses.replace(TINY, num_episodes=5)
    assert [expected_steps(config, Clock(*now)) for now in ((6, 0), (14, 1), (14, 2), (35, 5))] == [60, 60, 35, 35]
    assert expected_steps(TINY, Clock(14, 2)) == 60


def test_a_run_whose_last_step_ends_several_episodes_is_done(tmp_path: Path) -> None:
    config = dataclasses.replace(TINY, num_envs=2, num_episodes=3, eval_frequency=None)
    for resume in (False, True):
        train(config, run_dir=tmp_path / "run", resume=resume, device="cpu")
        saved = load_checkpoint(tmp_path / "run", "dqn")
        assert (saved["global_step"], saved["episodes"]) == (28, 4)


def test_a_run_that_has_played_more_episodes_can_not_end_earlier(tmp_path: Path) -> None:
    train(TINY, run_dir=tmp_path / "run", device="cpu")
    with pytest.raises(ConfigError, match="--num-episodes must be at least the 8 episodes already done"):
        train(dataclasses.replace(TINY, num_episodes=5), run_dir=tmp_path / "run", resume=True, device="cpu")


def test_what_a_run_directory_holds(tmp_path: Path) -> None:
    network = train(TINY, run_dir=tmp_path / "run", device="cpu")
    last = load_checkpoint(tmp_path / "run", "dqn", "model", "target", "optimizer", "episodes")
    assert torch.equal(last["model"]["head.weight"], network.state_dict()["head.weight"])
    assert (last["global_step"], last["episodes"]) == (60, 8)
    best = load_checkpoint(tmp_path / "run", "dqn", "model", file=BEST_FILE)
    assert best["global_step"] == 25, "all games are alike: the first of equals"
    assert json.loads((tmp_path / "run" / "config.json").read_text())["hidden_sizes"] == [24, 24]
    scalars = read_scalars(tmp_path / "run")
    assert scalars["eval/mean_return"] == [(25, 28.0), (50, 28.0), (60, 28.0)]
    assert [step for step, _ in scalars["charts/epsilon"]] == [25, 50, 60], "at the greedy games and at the end"
    assert {step for step, _ in scalars["charts/episodic_return"]} == {7, 14, 21, 28, 35, 42, 49, 56}
    for tag in ("losses/td_loss", "losses/q_values", "charts/learning_rate"):
        assert all(math.isfinite(value) for _, value in scalars[tag]), tag
    assert evaluate(tmp_path / "run", episodes=3)["returns"] == [28.0] * 3


def test_best_is_the_network_of_its_step_and_only_a_better_one_replaces_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scores = iter([3.0, 9.0, 9.0])
    monkeypatch.setattr(Evaluator, "mean_return", lambda evaluator, policy, global_step, to_beat: next(scores))
    last = train(TINY, run_dir=tmp_path / "run", device="cpu")
    best = load_checkpoint(tmp_path / "run", "dqn", "model", file=BEST_FILE)
    assert (best["global_step"], best["best_return"]) == (50, 9.0)
    assert not torch.equal(best["model"]["head.weight"], last.state_dict()["head.weight"])


def test_evaluation_plays_the_best_network_unless_told_otherwise(tmp_path: Path) -> None:
    config = dataclasses.replace(TINY, env_id="CartPole-v1")
    train(config, run_dir=tmp_path / "run", device="cpu")
    for file, action in [("best.pt", 1.0), ("checkpoint.pt", -1.0)]:  # push right for ever, or left
        saved = load_checkpoint(tmp_path / "run", "dqn", "model", file=file)
        saved["model"] = {name: torch.zeros_like(value) for name, value in saved["model"].items()}
        saved["model"]["head.bias"] = torch.tensor([0.0, action])
        torch.save(saved, tmp_path / "run" / file)
    with make_vector_env("CartPole-v1", 1) as envs:
        for action, last in [(1, False), (0, True)]:
            envs.reset(seed=3)
            length = 1
            while not envs.step(np.array([action])).terminated[0]:
                length += 1
            assert evaluate(tmp_path / "run", episodes=1, seed=3, last=last)["returns"] == [length]


def test_judging_changes_nothing_of_the_training(tmp_path: Path) -> None:
    config = dataclasses.replace(TINY, env_id="CartPole-v1", total_timesteps=100)
    with_games = train(config, run_dir=tmp_path / "a", device="cpu")
    without = train(dataclasses.replace(config, eval_frequency=None), run_dir=tmp_path / "b", device="cpu")
    assert torch.equal(parameters(with_games), parameters(without))
    assert not (tmp_path / "b" / BEST_FILE).exists()


@pytest.mark.parametrize("env_id", ["CartPole-v1", "tests.fake_envs:Counter-v0", "Acrobot-v1"])
def test_one_seed_gives_one_result(env_id: str, device: str) -> None:
    config = dataclasses.replace(TINY, env_id=env_id, total_timesteps=80)
    first, second = (parameters(train(config, device=device)) for _ in range(2))
    assert torch.equal(first, second)
    assert not torch.equal(first, parameters(train(dataclasses.replace(config, seed=43), device=device)))


def test_a_resumed_run_goes_on_where_it_stopped(tmp_path: Path, device: str) -> None:
    train(TINY, run_dir=tmp_path / "run", device=device)
    train(dataclasses.replace(TINY, total_timesteps=100), run_dir=tmp_path / "run", resume=True, device="cpu")
    train(dataclasses.replace(TINY, total_timesteps=120), run_dir=tmp_path / "run", resume=True, device=device)
    saved = load_checkpoint(tmp_path / "run", "dqn")
    assert (saved["global_step"], saved["episodes"]) == (120, 17), "an episode has 7 steps, and none was begun anew"
    # 41 updates from step 20 to 60, and 60 more
    assert {int(state["step"]) for state in saved["optimizer"]["state"].values()} == {41 + 60}


def test_resuming_a_finished_run_changes_nothing(tmp_path: Path) -> None:
    train(TINY, run_dir=tmp_path / "run", device="cpu")
    saved = load_checkpoint(tmp_path / "run", "dqn")
    assert not torch.equal(saved["target"]["head.weight"], saved["model"]["head.weight"])
    train(TINY, run_dir=tmp_path / "run", resume=True, device="cpu")
    again = load_checkpoint(tmp_path / "run", "dqn")
    for name in ("model", "target"):
        for key, value in again[name].items():
            assert torch.equal(value, saved[name][key]), (name, key)
    for restored, original in zip(
        again["optimizer"]["state"].values(), saved["optimizer"]["state"].values(), strict=True
    ):
        assert all(torch.equal(restored[key], original[key]) for key in ("step", "exp_avg", "exp_avg_sq"))


def test_what_is_later_than_the_checkpoint_does_not_survive_a_resume(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scores = {25: 3.0, 40: 1.0, 50: 9.0, 60: 5.0, 74: 8.0}
    monkeypatch.setattr(Evaluator, "mean_return", lambda evaluator, policy, global_step, to_beat: scores[global_step])
    checkpoint = Run.checkpoint

    def killed(run: Run, global_step: int, *arguments: Any, **options: Any) -> None:
        if global_step == 50:  # best.pt is written, and its checkpoint is not
            raise InterruptedError
        checkpoint(run, global_step, *arguments, **options)

    with monkeypatch.context() as patch, pytest.raises(InterruptedError):
        patch.setattr(Run, "checkpoint", killed)
        train(TINY, run_dir=tmp_path / "run", device="cpu")
    assert load_checkpoint(tmp_path / "run", "dqn")["global_step"] == 25, "each better network has its checkpoint"
    (tmp_path / "run" / "videos").mkdir()
    for step in (25, 50):
        (tmp_path / "run" / "videos" / f"step-{step:09}.gif").touch()
    shutil.copytree(tmp_path / "run", tmp_path / "further")

    train(dataclasses.replace(TINY, total_timesteps=40), run_dir=tmp_path / "run", resume=True, device="cpu")
    assert not (tmp_path / "run" / BEST_FILE).exists(), "this run has never come to step 50"
    assert [path.name for path in (tmp_path / "run" / "videos").iterdir()] == ["step-000000025.gif"]

    for total in (60, 74):  # what is not as good as the best replaces nothing, in a session after it, too
        config = dataclasses.replace(TINY, total_timesteps=total)
        train(config, run_dir=tmp_path / "further", resume=True, device="cpu")
        best = load_checkpoint(tmp_path / "further", "dqn", file=BEST_FILE)
        assert (best["global_step"], best["best_return"]) == (50, 9.0)


@pytest.mark.parametrize("kind", ["uint8 vector", "float64 vector", "colours"])
def test_other_observations_train(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = dataclasses.replace(
        TINY, env_id=f"tests.fake_envs:{kind.title().replace(' ', '')}-v0", eval_frequency=None
    )
    assert parameters(train(config, device="cpu")).isfinite().all()


def test_each_frame_of_a_game_is_stored_once() -> None:
    with make_vector_env(SMALL_PONG.env_id, 1) as envs:
        memory = ReplayBuffer(SMALL_PONG.buffer_size, envs.observation_space, stacked=envs.stacked)
    arrays = [array for array in vars(memory.observations).values() if isinstance(array, np.ndarray)]
    frames = sum(array.nbytes for array in arrays) / (84 * 84)
    assert SMALL_PONG.buffer_size < frames < 1.1 * SMALL_PONG.buffer_size


def test_colours_are_no_stack_of_frames(monkeypatch: pytest.MonkeyPatch) -> None:
    memories = []

    class Spy(ReplayBuffer):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options)
            memories.append(self)

    monkeypatch.setattr("minirl.dqn.ReplayBuffer", Spy)
    config = dataclasses.replace(TINY, env_id="tests.fake_envs:Colours-v0", eval_frequency=None)
    train(config, device="cpu")
    batch = memories[0].sample(20)
    assert batch.observations.dtype == np.uint8
    for obs, next_obs in zip(batch.observations, batch.next_observations, strict=True):
        red, green, blue = obs[:, 0, 0].tolist()
        assert (green, blue) == (red + 100, red + 200)
        assert next_obs[0, 0, 0] == red + 1


def test_nothing_is_written_without_a_run_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    train(TINY, device="cpu")
    assert list(tmp_path.iterdir()) == []


def test_two_updates_on_the_real_pong(tmp_path: Path, device: str) -> None:
    torch.manual_seed(SMALL_PONG.seed)
    with make_vector_env(SMALL_PONG.env_id, 1) as envs:
        before = QNetwork(envs.observation_space, 6)
    after = train(SMALL_PONG, run_dir=tmp_path / "run", device=device).cpu()
    for (name, old), new in zip(before.named_parameters(), after.named_parameters(), strict=True):
        assert new[1].isfinite().all(), name
        assert not torch.equal(old, new[1]), name
        assert (new[1] - old).abs().max() < 2.1 * 1e-4, name  # two steps of Adam, the one seed's network
    saved = load_checkpoint(tmp_path / "run", "dqn")
    assert {int(state["step"]) for state in saved["optimizer"]["state"].values()} == {2}  # at 36 and 40
    assert torch.equal(saved["target"]["head.weight"], saved["model"]["head.weight"]), "copied at 40"
    assert all(math.isfinite(value) for _, value in read_scalars(tmp_path / "run")["losses/td_loss"])


def test_begins_to_learn_cartpole(tmp_path: Path) -> None:
    config = DQNConfig(seed=1, total_timesteps=3_500, exploration_fraction=0.23, learning_starts=500)
    train(dataclasses.replace(config, eval_frequency=None), run_dir=tmp_path / "run", device="cpu")
    returns = load_checkpoint(tmp_path / "run", "dqn")["returns"]
    assert np.mean(returns[:20]) < 40
    assert np.mean(returns[-10:]) > 120


@pytest.mark.slow
@pytest.mark.parametrize(("total_timesteps", "compiled"), [(25_000, False), (40_000, True)])
def test_learns_cartpole(tmp_path: Path, total_timesteps: int, compiled: bool) -> None:
    config = DQNConfig(seed=1, total_timesteps=total_timesteps, checkpoint_frequency=1_000_000, compile=compiled)
    train(config, run_dir=tmp_path / "run", device="cpu")
    result = evaluate(tmp_path / "run", episodes=40)
    assert result["mean_return"] >= 475, result


# Mistakes


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_size": 51}, "--batch-size must be at most buffer_size = 50"),
        (
            {"learning_starts": 61},
            "--total-timesteps must be at least 61, or nothing is learned: learning_starts is 61",
        ),
        ({"train_frequency": 61}, "--total-timesteps must be at least 61, or nothing is learned"),
        ({"batch_size": 50, "total_timesteps": 49}, "--total-timesteps must be at least 50, or nothing is learned"),
        ({"train_frequency": 0}, "--train-frequency must be a whole number of at least 1"),
        ({"target_network_frequency": 0}, "--target-network-frequency must be"),
        ({"eval_frequency": 0}, "--eval-frequency must be a whole number of at least 1 or none"),
        ({"num_envs": 4}, "--buffer-size must be a multiple of num_envs = 4"),
        ({"tau": 0.0}, "--tau must be"),
        ({"gamma": 1.5}, "--gamma must be"),
        ({"end_epsilon": 0.5, "start_epsilon": 0.3}, "--end-epsilon must be at most start_epsilon = 0.3"),
        ({"hidden_sizes": (24, 0)}, "--hidden-sizes must be whole numbers"),
        ({"hidden_sizes": (24, 2.5)}, "--hidden-sizes must be whole numbers"),
        ({"hidden_sizes": 24}, "--hidden-sizes must be whole numbers"),
        ({"epsilon_decay": 1.1}, "--epsilon-decay must be"),
        ({"exploration_fraction": 0.0}, "--exploration-fraction must be"),
        ({"learning_rate": math.nan}, "--learning-rate must be"),
    ],
)
def test_settings_that_can_not_work_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        dataclasses.replace(TINY, **settings)


@pytest.mark.parametrize(
    ("env_id", "message"),
    [
        ("tests.fake_envs:OneActions-v0", "must have Discrete actions for DQN"),
        ("NoSuchEnv-v0", "--env-id must be"),
    ],
)
def test_environments_that_can_not_work_are_refused(env_id: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        train(dataclasses.replace(TINY, env_id=env_id), run_dir=tmp_path / "run", device="cpu")
    assert not (tmp_path / "run").exists()


def test_a_total_below_what_is_done_is_refused(tmp_path: Path) -> None:
    train(TINY, run_dir=tmp_path / "run", device="cpu")
    with pytest.raises(ConfigError, match="--total-timesteps must be at least the 60 steps"):
        train(dataclasses.replace(TINY, total_timesteps=32), run_dir=tmp_path / "run", resume=True, device="cpu")


SMALL = "--total-timesteps 60 --learning-starts 20 --buffer-size 50 --batch-size 4 --eval-episodes 2"


def test_the_command_line_trains_resumes_and_evaluates(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_dir = tmp_path / "run"
    flags = f"{SMALL} --hidden-sizes 8,6,4 --run-dir {run_dir} --device cpu"
    config, network = run_training("dqn", DQNConfig, train, "", flags.split())
    assert config.hidden_sizes == (8, 6, 4)
    assert [layer.out_features for layer in network.body if isinstance(layer, torch.nn.Linear)] == [8, 6, 4]
    run_training("dqn", DQNConfig, train, "", f"--resume {run_dir} --hidden-sizes 8,6,4 --total-timesteps 90".split())
    assert load_checkpoint(run_dir, "dqn")["global_step"] == 90
    with pytest.raises(SystemExit):
        run_training("dqn", DQNConfig, train, "", f"--resume {run_dir} --hidden-sizes 8,6".split())
    assert "--hidden-sizes 8,6 can't go with --resume: the run has 8,6,4" in capsys.readouterr().err
    evaluate_main([str(run_dir), "--episodes", "2", "--last"])
    assert "return over 2 games, greedy actions" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        evaluate_main([str(run_dir), "--stochastic"])
    assert "error: --stochastic must go with a run of ppo" in capsys.readouterr().err
