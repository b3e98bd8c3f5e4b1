"""Double DQN (van Hasselt et al. 2016, https://arxiv.org/abs/1509.06461), on the DQN of Mnih et al. (2015).

    repeat for each step:
        a  <- a random action with probability epsilon, else argmax_a Q(s, a)        epsilon_greedy
        take a, see r and s'; remember (s, a, r, s')                                 ReplayBuffer
        draw a batch from the memory:                                                gradient_step
            a* = argmax_a Q(s', a)                      the online network selects,
            y  = r + gamma Q_target(s', a*)             the target network evaluates double_dqn_target
            loss = mean((Q(s, a) - y)^2), one step of Adam                           dqn_loss
        now and then Q_target <- Q                                                   TargetUpdate

Nothing follows a terminal state, so y = r there; a truncated episode would have gone on, and keeps its bootstrap.

Read from top to bottom: settings, network, the maths as pure functions, training.
"""

import functools
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from minirl.checks import ConfigError, require_same_shape
from minirl.distributed import require_one_process
from minirl.envs.make import make_envs_of
from minirl.envs.spaces import SMALLEST_IMAGE
from minirl.fast.compiled import compiled, pays_off
from minirl.fast.machine import PRECISIONS, Float32Linear, autocast, select_device, select_precision
from minirl.fast.small import InTraining, Layers, SmallSequential
from minirl.networks import NatureCNN, is_image, mlp, observation_tensor, orthogonal
from minirl.replay import Batch, ReplayBuffer
from minirl.results.play import Evaluator
from minirl.results.video import Videos
from minirl.runs.checkpoints import Part, State, load_parts, reading, save_parts
from minirl.runs.losses import RecentLosses
from minirl.runs.resume import MemoryFiles, env_state, saved_run, start_envs
from minirl.runs.run import Run, seed_everything
from minirl.runs.settings import MAX_THREADS, check_settings, require_default, setting
from minirl.streams import MAX_SEED, Stream

LOG_EVERY = 1_000  # agent steps


@dataclass(frozen=True)
class DQNConfig:
    """The settings of a run; the defaults are for CartPole (docs/dqn-cartpole.md says what chose them)."""

    env_id: str = setting("CartPole-v1", "environment, any id that gymnasium.make takes", group="task")
    seed: int = setting(42, "seed of every random number; environment i gets seed + i", at_least=0, at_most=MAX_SEED)
    total_timesteps: int = setting(100_000, "agent steps to train for, over all environments", at_least=1)
    num_episodes: int | None = setting(None, "stop after this many episodes, if that is sooner", at_least=1)
    frame_size: int = setting(84, "rows and columns of an Atari game's frames", at_least=SMALLEST_IMAGE)
    num_envs: int = setting(1, "environments played side by side (N)", at_least=1, group="environments and memory")
    buffer_size: int = setting(100_000, "transitions remembered, over all environments", at_least=1)
    hidden_sizes: tuple[int, ...] = setting((24, 24), "hidden layers on vectors", at_least=1, group="network and loss")
    gamma: float = setting(0.99, "discount factor", at_least=0, at_most=1)
    huber: bool = setting(False, "smooth-L1 loss; otherwise the mean squared error")
    learning_starts: int = setting(1_000, "agent steps before the first update", at_least=0, group="updates")
    train_frequency: int = setting(1, "agent steps between updates", at_least=1)
    gradient_steps: int = setting(1, "gradient steps per update", at_least=1)
    batch_size: int = setting(64, "transitions per gradient step (B)", at_least=1)
    learning_rate: float = setting(5e-3, "Adam's step size", above=0)
    anneal_lr: bool = setting(True, "lower the learning rate linearly to 0 at total_timesteps")
    max_grad_norm: float | None = setting(None, "clip the norm of the gradient to this; none: never", above=0)
    target_network_frequency: int = setting(1, "agent steps between target updates", at_least=1, group="target network")
    target_network_episodes: int | None = setting(None, "episodes between target updates; none: by steps", at_least=1)
    tau: float = setting(0.01, "how far an update moves the target network; 1 copies", above=0, at_most=1)
    start_epsilon: float = setting(1.0, "initial share of random actions", at_least=0, at_most=1, group="exploration")
    end_epsilon: float = setting(0.05, "final share of random actions", at_least=0, at_most=1)
    exploration_fraction: float = setting(0.1, "share of the run over which epsilon falls", above=0, at_most=1)
    epsilon_decay: float | None = setting(None, "factor of epsilon per episode; none: linear", above=0, at_most=1)
    eval_frequency: int | None = setting(1_000, "agent steps between evaluations", at_least=1, group="evaluation")
    eval_episodes: int = setting(20, "greedy games per evaluation; the best network goes to best.pt", at_least=1)
    confirm_episodes: int = setting(200, "further games to confirm a new best network", at_least=0)
    compile: bool | None = setting(None, "compile the update; none: in long runs", group="machine and files")
    precision: str = setting("auto", "of the CNN: float32, bfloat16 or auto (the faster one)", choices=PRECISIONS)
    num_workers: int | None = setting(None, "processes that play; none: one per core if games are slow", at_least=1)
    num_threads: int | None = setting(None, "threads; none: 1 for small networks", at_least=1, at_most=MAX_THREADS)
    checkpoint_frequency: int = setting(10_000, "agent steps between checkpoints", at_least=1)
    video_frequency: int | None = setting(None, "agent steps between games recorded as videos; none: never", at_least=1)

    def __post_init__(self) -> None:
        check_settings(self)
        if self.buffer_size % self.num_envs != 0:
            raise ConfigError(f"--buffer-size must be a multiple of num_envs = {self.num_envs}, not {self.buffer_size}")
        if self.batch_size > self.buffer_size:
            raise ConfigError(f"--batch-size must be at most buffer_size = {self.buffer_size}, not {self.batch_size}")
        learns_from = max(self.learning_starts, self.batch_size)
        learns_from = math.ceil(learns_from / self.train_frequency) * self.train_frequency
        if learns_from > self.last_step:
            decides = ("learning_starts", "batch_size", "train_frequency")
            because = ", ".join(f"{name} is {getattr(self, name)}" for name in decides)
            raise ConfigError(f"--total-timesteps must be at least {learns_from}, or nothing is learned: {because}")
        if self.epsilon_decay is not None:
            require_default(self, "exploration_fraction", because="with epsilon_decay, epsilon falls by episodes")
        if self.target_network_episodes is not None:
            require_default(self, "target_network_frequency", because="with target_network_episodes, episodes count")
        if self.end_epsilon > self.start_epsilon:
            limit = f"start_epsilon = {self.start_epsilon}"
            raise ConfigError(f"--end-epsilon must be at most {limit}, not {self.end_epsilon}")

    @property
    def num_gradient_steps(self) -> float:
        """Gradient steps in a run, about."""
        return self.total_timesteps * self.gradient_steps / self.train_frequency

    @property
    def last_step(self) -> int:
        """Agent steps of a whole run: the last vector step may go past `total_timesteps`."""
        return math.ceil(self.total_timesteps / self.num_envs) * self.num_envs


class QNetwork(SmallSequential):
    """The action values Q(s, .): a body (an MLP with ReLU for vectors, the Nature CNN for images), then a head.

    Observations (B, ...) -> values (B, A).

    With two hidden layers of 24 it has 770 parameters on CartPole, like the source notebook's. `SmallSequential` is an
    `nn.Sequential`; for a network that is not a sequence, give the class a `forward(self, obs)`.

    Args:
        observation_space: of one environment.
        num_actions: A.
        hidden_sizes: widths of the hidden layers on vectors; the CNN has its own.

    Raises:
        ConfigError: if the observations are not a Box of vectors or images.
    """

    def __init__(
        self,
        observation_space: gym.Space[Any],
        num_actions: int,
        hidden_sizes: tuple[int, ...] = DQNConfig.hidden_sizes,
    ) -> None:
        super().__init__()
        images = is_image(observation_space)
        assert observation_space.shape is not None
        sizes = (*observation_space.shape, *hidden_sizes)
        num_features = NatureCNN.num_features if images else sizes[-1]
        self.body = NatureCNN(observation_space.shape) if images else mlp(sizes, nn.ReLU)
        self.head = orthogonal(Float32Linear(num_features, num_actions), gain=0.01)


@torch.no_grad()
def double_dqn_target(
    rewards: Tensor, terminated: Tensor, next_q_online: Tensor, next_q_target: Tensor, gamma: float
) -> Tensor:
    """The target of Q(s, a), y = r + gamma (1 - terminated) Q_target(s', argmax_a Q(s', a)).

    The online network selects and the target network evaluates: one network doing both would pick its own overestimates
    (van Hasselt et al. 2016, eq. 4). The result carries no gradient.

    Args:
        rewards: (B,).
        terminated: (B,) real ends, after which nothing follows; a truncated episode does not count.
        next_q_online: (B, A) Q(s', .) of the online network.
        next_q_target: (B, A) Q(s', .) of the target network.
        gamma: discount factor.

    Returns:
        y (B,).

    Raises:
        ValueError: if the shapes do not fit.
    """
    require_same_shape(rewards=rewards, terminated=terminated)
    require_same_shape(next_q_online=next_q_online, next_q_target=next_q_target)
    require_same_shape(rewards=rewards, next_q_online_of_an_action=next_q_online[..., 0])
    best_actions = next_q_online.argmax(dim=-1, keepdim=True)
    next_values = next_q_target.gather(-1, best_actions).squeeze(-1)
    return rewards + gamma * next_values.where(~terminated.bool(), 0.0)


def dqn_loss(q_values: Tensor, actions: Tensor, targets: Tensor, *, huber: bool = False) -> Tensor:
    """The loss, L = mean((Q(s, a) - y)^2), or with `huber` the mean of the smooth-L1 of the same TD errors.

    No factor 1/2 on the square. Smooth-L1 is d^2 / 2 up to |d| = 1 and |d| - 1/2 beyond: its gradient is d
    clipped to [-1, 1], which is what Mnih et al. (2015) mean by clipping the error.

    Args:
        q_values: (B, A) Q(s, .), carries the gradient.
        actions: (B,) a.
        targets: (B,) y.
        huber: use smooth-L1.

    Raises:
        ValueError: if the shapes do not fit.
    """
    require_same_shape(actions=actions, targets=targets, q_values_of_an_action=q_values[..., 0])
    chosen = q_values.gather(-1, actions[..., None]).squeeze(-1)
    return F.smooth_l1_loss(chosen, targets) if huber else F.mse_loss(chosen, targets)


class Clock(NamedTuple):
    """How far a run has got: agent steps over all environments, and finished episodes."""

    steps: int
    episodes: int


def times_due(every: int, before: int, now: int) -> int:
    """How many multiples of `every` lie in (before, now]: how often something done every so many steps is due now."""
    return now // every - before // every


def epsilon_at(config: DQNConfig, now: Clock) -> float:
    """Return the probability of a random action.

    It falls linearly over the first `exploration_fraction` of the steps, or by the factor `epsilon_decay` per episode.
    """
    if config.epsilon_decay is not None:
        return max(config.end_epsilon, config.start_epsilon * config.epsilon_decay**now.episodes)
    progress = min(1.0, now.steps / (config.exploration_fraction * config.total_timesteps))
    return config.start_epsilon + progress * (config.end_epsilon - config.start_epsilon)


def target_updates_due(config: DQNConfig, before: Clock, now: Clock) -> int:
    """How many updates of the target network are due, by steps or by episodes."""
    if config.target_network_episodes is not None:
        return times_due(config.target_network_episodes, before.episodes, now.episodes)
    return times_due(config.target_network_frequency, before.steps, now.steps)


def is_finished(config: DQNConfig, now: Clock) -> bool:
    """Whether the run has done all its steps, or all its episodes."""
    return now.steps >= config.last_step or (config.num_episodes is not None and now.episodes >= config.num_episodes)


def expected_steps(config: DQNConfig, now: Clock) -> int:
    """Return the agent steps of the whole run, assuming that episodes stay as long as they were so far."""
    if is_finished(config, now):
        return now.steps
    if config.num_episodes is None or now.episodes == 0:
        return config.last_step
    return min(config.last_step, now.steps * config.num_episodes // now.episodes)


def make_q_network(config: DQNConfig, observation_space: gym.Space[Any], action_space: gym.Space[Any]) -> QNetwork:
    """Make the network that the settings ask for.

    Raises:
        ConfigError: if the actions are not Discrete, the observations are neither vectors nor images, or hidden layers
            are chosen for images.
    """
    if is_image(observation_space):
        require_default(config, "hidden_sizes", because="images go through the Nature CNN")
    if not isinstance(action_space, gym.spaces.Discrete):
        raise ConfigError(f"--env-id must have Discrete actions for DQN, not {action_space}")
    return QNetwork(observation_space, int(action_space.n), config.hidden_sizes)


@torch.no_grad()
def action_values(network: nn.Module, device: torch.device, obs: NDArray[Any]) -> NDArray[np.float32]:
    """Return Q(s, .) of observations: (N, ...) -> (N, A)."""
    values: NDArray[np.float32] = network(observation_tensor(obs, device)).cpu().numpy()
    return values


def greedy_actions(network: nn.Module, device: torch.device, obs: NDArray[Any]) -> NDArray[np.int64]:
    """Return the first of the best actions: observations (N, ...) -> (N,)."""
    actions: NDArray[np.int64] = action_values(network, device, obs).argmax(axis=-1)
    return actions


def epsilon_greedy(q_values: NDArray[np.float32], epsilon: float, rng: np.random.Generator) -> NDArray[np.int64]:
    """Return for each state a random action with probability epsilon, else the first of the best: (N, A) -> (N,)."""
    actions: NDArray[np.int64] = q_values.argmax(axis=-1)
    for state in range(len(actions)):
        if rng.random() < epsilon:
            actions[state] = rng.integers(q_values.shape[-1])
    return actions


def gradient_step(
    online: nn.Module,
    target: nn.Module,
    optimizer: torch.optim.Optimizer,
    config: DQNConfig,
    precision: torch.dtype,
    batch: Batch[Tensor],
) -> dict[str, Tensor]:
    """Take one optimiser step on a batch; return its statistics to log, by name."""
    with autocast(precision, batch.observations.device):
        with torch.no_grad():
            next_q_online, next_q_target = online(batch.next_observations), target(batch.next_observations)
        q_values = online(batch.observations)
    targets = double_dqn_target(batch.rewards, batch.terminated, next_q_online, next_q_target, config.gamma)
    loss = dqn_loss(q_values, batch.actions, targets, huber=config.huber)
    optimizer.zero_grad()
    loss.backward()
    grad_norm = nn.utils.clip_grad_norm_(online.parameters(), config.max_grad_norm or math.inf, foreach=False)
    optimizer.step()
    chosen_q = q_values.detach().gather(-1, batch.actions[:, None])
    return {"td_loss": loss.detach(), "q_values": chosen_q.mean(), "grad_norm": grad_norm}  # before clipping


class TargetUpdate:
    """Moves the target network towards the online one, w_target += tau (w - w_target); tau = 1 copies.

    Buffers, such as running means, are always copied, as in Stable-Baselines3.
    """

    def __init__(self, target: nn.Module, online: nn.Module, tau: float) -> None:
        self.target, self.online, self.tau = Layers(target), Layers(online), tau

    @torch.no_grad()
    def update(self) -> None:
        """Move it once."""
        torch._foreach_lerp_(self.target.parameters(), self.online.parameters(), self.tau)
        self.target.copy_buffers(self.online)


def train(
    config: DQNConfig, *, run_dir: str | Path | None = None, resume: bool = False, device: str = "auto"
) -> QNetwork:
    """Train and return the network at the end; `best.pt` in the run directory holds the best one.

    Args:
        config: the settings.
        run_dir: where checkpoints, `best.pt` and TensorBoard events go; None writes nothing and picks no best network.
        resume: continue from the checkpoint in `run_dir`, as if the run had not stopped.
        device: `auto`, `cpu` or `cuda`.

    Raises:
        ConfigError: if the environment, the device or the run directory can't be used.
        EnvError: if the environment fails.
        KeyboardInterrupt: on Ctrl-C, after saving; its subclass `Stopped` on SIGTERM, SIGHUP or a closed stderr.
    """
    require_one_process("Double DQN")
    torch_device = select_device(device)
    run_dir, saved = saved_run("dqn", config, run_dir, resume, "episodes", "rng", "memory", "envs", "obs")
    start = now = Clock(saved["global_step"], saved["episodes"]) if saved else Clock(0, 0)
    if config.num_episodes is not None and start.episodes >= config.num_episodes + config.num_envs:
        raise ConfigError(f"--num-episodes must be at least the {start.episodes} episodes already done")
    videos = Videos(config, run_dir, start.steps)
    seed_everything(config.seed)
    # For exploration and replay. Not the seed itself, which is environment 0's: actions would correlate with its noise.
    rng = np.random.default_rng(np.random.SeedSequence(config.seed, spawn_key=(Stream.EXPLORATION, 0)))
    with make_envs_of(config, config.num_envs) as envs, Evaluator(config, run_dir) as evaluator:
        spaces = envs.observation_space, envs.action_space
        online, target = (make_q_network(config, *spaces).to(torch_device).eval() for _ in range(2))
        target.load_state_dict(online.state_dict())
        optimizer = torch.optim.Adam(online.parameters(), lr=config.learning_rate, fused=True)
        rates = [group["lr"] for group in optimizer.param_groups]
        losses = RecentLosses(torch_device)
        # What a checkpoint holds: add a line here to save and load anything with `state_dict` and `load_state_dict`.
        learned: dict[str, Part] = {"model": online, "target": target, "optimizer": optimizer, "losses": losses}
        target_step = TargetUpdate(target, online, config.tau)
        memory = ReplayBuffer(config.buffer_size, spaces[0], config.num_envs, stacked=envs.stacked, seed=rng)
        memory_files = MemoryFiles(run_dir)

        precision = select_precision(config.precision, torch_device, images=is_image(envs.observation_space))
        pays = pays_off(config.compile, config.num_gradient_steps)
        step = compiled(gradient_step, online, target, optimizer, config, precision, enabled=pays)
        in_training = InTraining(online)  # batch norm learns and dropout is on in gradient steps only
        q_values = functools.partial(action_values, online, torch_device)
        greedy = functools.partial(greedy_actions, online, torch_device)

        load_parts(learned, saved)
        obs = start_envs(envs, config.seed, saved)
        if saved is not None:
            with reading(saved):
                memory_files.load(memory, saved["memory"])
                rng.bit_generator.state = saved["rng"]
            if saved["envs"] is None:  # the environments could not be saved, and new games have begun
                memory.cut()

        def state() -> State:
            return {
                **save_parts(learned),
                "episodes": now.episodes,
                "rng": rng.bit_generator.state,
                "memory": memory_files.save(memory),
                **env_state(envs, obs),
            }

        with Run("dqn", config, run_dir, online, total=config.last_step, done=start.steps, resumed=saved) as run:
            run.checkpoint(now.steps, state)
            finished = is_finished(config, now)
            while not finished:
                epsilon = epsilon_at(config, now)
                if config.anneal_lr:
                    for group, rate in zip(optimizer.param_groups, rates, strict=True):
                        group["lr"] = rate * (1 - now.steps / config.last_step)

                actions = epsilon_greedy(q_values(obs), epsilon, rng)
                played = envs.step(actions)
                memory.add(
                    obs, actions, played.rewards, played.next_observations(), played.terminated, played.truncated
                )
                obs = played.observations.copy()
                before, now = now, Clock(now.steps + config.num_envs, now.episodes + len(played.episodes))

                if now.steps >= config.learning_starts and len(memory) >= config.batch_size:
                    for _ in range(config.gradient_steps * times_due(config.train_frequency, before.steps, now.steps)):
                        batch = memory.sample(config.batch_size).to(torch_device)
                        with in_training:
                            losses.append(step(batch))
                for _ in range(target_updates_due(config, before, now)):
                    target_step.update()

                finished = is_finished(config, now)
                run.log_episodes(now.steps, played.episodes)
                evaluate_now = evaluator.is_due(before.steps, now.steps, finished=finished)
                if times_due(LOG_EVERY, before.steps, now.steps) or finished or evaluate_now:
                    rate = float(optimizer.param_groups[0]["lr"])
                    scalars = {"charts/epsilon": epsilon, "charts/learning_rate": rate, **losses.means()}
                    run.log(now.steps, scalars, total=expected_steps(config, now))
                if evaluate_now:
                    mean_return = evaluator.mean_return(greedy, now.steps, to_beat=run.best_return)
                    run.keep_best(now.steps, mean_return, lambda: save_parts(learned))
                videos.record(run, now.steps, greedy)
                run.checkpoint(now.steps, state, finished=finished)
    return online
