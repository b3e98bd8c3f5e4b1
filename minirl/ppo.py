"""Proximal Policy Optimization (Schulman et al. 2017, https://arxiv.org/abs/1707.06347).

    repeat:
        play T steps in N environments with the policy pi_old                       collect_rollout
        A_t = sum_l (gamma lambda)^l delta_{t+l},  R_t = A_t + V(s_t),               compute_gae
            delta_t = r_t + gamma V(s_{t+1}) - V(s_t)
        for a few epochs, for each minibatch of the T N samples:                     update_policy
            r = pi(a|s) / pi_old(a|s)
            loss = -mean(min(r A, clip(r, 1 - eps, 1 + eps) A))                      clipped_surrogate_loss
                   + c_vf mean((V - R)^2)                                            value_loss
                   - c_ent mean(entropy of pi)                                       ppo_loss
            one step of Adam, the gradient's norm clipped                            gradient_step

Read from top to bottom: settings, network, the maths as pure functions, training.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from minirl import distributed
from minirl.checks import ConfigError, require_same_shape
from minirl.envs.make import make_envs_of
from minirl.envs.spaces import SMALLEST_IMAGE
from minirl.envs.vector import Episode, VectorEnv
from minirl.fast.compiled import compiled, pays_off
from minirl.fast.gpu import cuda_graphed, fetch_async
from minirl.fast.machine import PRECISIONS, Float32Linear, acting, autocast, select_device, select_precision
from minirl.fast.small import InTraining
from minirl.networks import Distribution, NatureCNN, action_distribution, is_image, mlp, observation_tensor, orthogonal
from minirl.normalize import NormalizeObservation, NormalizeReward
from minirl.results.video import Videos
from minirl.rollout import Columns, Rollout
from minirl.runs.checkpoints import Part, State, load_parts, require_finite_losses, save_parts
from minirl.runs.losses import explained_variance, mean_losses
from minirl.runs.resume import env_state, saved_run, start_envs
from minirl.runs.run import Run, seed_everything
from minirl.runs.settings import MAX_THREADS, check_settings, require_default, setting
from minirl.streams import MAX_SEED

ACTIVATIONS: dict[str, type[nn.Module]] = {"tanh": nn.Tanh, "relu": nn.ReLU}


@dataclass(frozen=True)
class PPOConfig:
    """The settings of a run; the defaults are the source notebook's for Pong."""

    env_id: str = setting("PongNoFrameskip-v4", "environment, any id that gymnasium.make takes", group="task")
    seed: int = setting(42, "seed of every random number; environment i gets seed + i", at_least=0, at_most=MAX_SEED)
    total_timesteps: int = setting(10_000_000, "agent steps to train for, over all environments", at_least=1)
    frame_size: int = setting(84, "rows and columns of an Atari game's frames", at_least=SMALLEST_IMAGE)
    num_envs: int = setting(8, "environments played side by side (N)", at_least=1, group="rollouts")
    num_steps: int = setting(128, "agent steps in each environment between updates (T)", at_least=1)
    hidden_sizes: tuple[int, ...] = setting((64, 64), "hidden layers on vectors", at_least=1, group="network")
    activation: str = setting("tanh", "of the hidden layers: tanh or relu", choices=tuple(ACTIVATIONS))
    cnn_channels: tuple[int, ...] = setting((32, 64, 64), "channels of the three convolutions on images", at_least=1)
    log_std_init: float = setting(0.0, "initial log standard deviation of a Gaussian policy", at_least=-20, at_most=2)
    norm_obs: bool = setting(False, "normalise observations by their running mean and variance (vectors)")
    gamma: float = setting(0.99, "discount factor", at_least=0, at_most=1, group="advantages")
    gae_lambda: float = setting(0.9, "lambda of the advantage estimate", at_least=0, at_most=1)
    norm_adv: bool = setting(True, "normalise the advantages of each minibatch")
    norm_reward: bool = setting(False, "divide rewards by the running standard deviation of the discounted return")
    minibatch_size: int = setting(256, "samples per gradient step, a divisor of N x T", at_least=1, group="optimiser")
    update_epochs: int = setting(4, "passes over the N x T samples per update", at_least=1)
    learning_rate: float = setting(2.5e-4, "Adam's step size", above=0)
    anneal_lr: bool = setting(False, "lower the learning rate linearly to 0 at the end")
    max_grad_norm: float = setting(0.5, "clip the norm of the gradient to this", above=0)
    target_kl: float | None = setting(None, "end an update once the KL divergence exceeds this; none: never", above=0)
    clip_coef: float = setting(0.1, "epsilon of the clipped objective", above=0, group="loss")
    anneal_clip: bool = setting(False, "lower clip_coef linearly to 0 at the end")
    vf_coef: float = setting(0.5, "weight of the value loss, which has no factor 1/2", at_least=0)
    value_clip_coef: float | None = setting(None, "clip the change of the values to this; none: no clipping", above=0)
    ent_coef: float = setting(0.01, "weight of the entropy bonus", at_least=0)
    compile: bool | None = setting(None, "compile acting and updates; none: in long runs", group="machine and files")
    precision: str = setting("auto", "of the CNN: float32, bfloat16 or auto (the faster one)", choices=PRECISIONS)
    num_workers: int | None = setting(None, "processes that play; none: one per core if games are slow", at_least=1)
    num_threads: int | None = setting(None, "threads; none: 1 for small networks", at_least=1, at_most=MAX_THREADS)
    checkpoint_frequency: int = setting(100_000, "agent steps between checkpoints", at_least=1)
    video_frequency: int | None = setting(None, "agent steps between games recorded as videos; none: never", at_least=1)

    def __post_init__(self) -> None:
        check_settings(self)
        if self.batch_size % self.minibatch_size != 0:
            sizes = f"num_envs x num_steps = {self.batch_size}, and {self.minibatch_size} does not"
            raise ConfigError(f"--minibatch-size must divide {sizes}")
        if self.norm_adv and self.minibatch_size == 1:
            raise ConfigError("--minibatch-size must be at least 2 to normalise advantages; or give --no-norm-adv")
        if len(self.cnn_channels) != 3:
            raise ConfigError(f"--cnn-channels must be three numbers, not {len(self.cnn_channels)}")

    @property
    def batch_size(self) -> int:
        """Samples per update: N x T."""
        return self.num_envs * self.num_steps

    @property
    def num_updates(self) -> int:
        """Updates in a run: the last one may go past `total_timesteps`."""
        return math.ceil(self.total_timesteps / self.batch_size)

    @property
    def num_gradient_steps(self) -> int:
        """Gradient steps in a run, if no update ends early."""
        return self.num_updates * self.update_epochs * (self.batch_size // self.minibatch_size)


class ActorCritic(nn.Module):
    """The policy pi(a|s) and the value V(s).

    Images (C, H, W) go through one Nature CNN that both heads share; vectors go through two MLPs, one per head. The
    policy's last layer starts near 0 (gain 0.01), so that all actions are about equally likely at first.
    The action space decides the distribution (`minirl.networks.action_distribution`): a Categorical for Discrete, a
    Gaussian for a Box. The Gaussian's log standard deviations are separate parameters.

    Args:
        observation_space: a Box.
        action_space: Discrete, MultiDiscrete, MultiBinary or a Box of floats.
        config: the settings; the defaults if left out.

    Raises:
        ConfigError: if the spaces are not of these kinds, or `norm_obs` is set for images.
    """

    def __init__(
        self, observation_space: gym.Space[Any], action_space: gym.Space[Any], config: PPOConfig | None = None
    ) -> None:
        super().__init__()
        config = PPOConfig() if config is None else config
        num_outputs, self.make_distribution = action_distribution(action_space)
        assert observation_space.shape is not None
        self.critic_body: nn.Module | None = None  # a separate body on vectors only
        self.actor_body: nn.Module
        self.normalize = NormalizeObservation(observation_space.shape) if config.norm_obs else None
        if is_image(observation_space):
            if config.norm_obs:
                raise ConfigError("--norm-obs must go with vectors as observations: images are divided by 255")
            self.actor_body = NatureCNN(observation_space.shape, config.cnn_channels)
            num_features = NatureCNN.num_features
        else:
            sizes = (*observation_space.shape, *config.hidden_sizes)
            self.actor_body, self.critic_body = (mlp(sizes, ACTIVATIONS[config.activation]) for _ in range(2))
            num_features = sizes[-1]
        self.actor = orthogonal(Float32Linear(num_features, num_outputs), gain=0.01)
        self.critic = orthogonal(Float32Linear(num_features, 1), gain=1.0)
        self.log_std: nn.Parameter | None = None  # the same in all states
        if isinstance(action_space, gym.spaces.Box):
            self.log_std = nn.Parameter(torch.full(action_space.shape, float(config.log_std_init)))

    def forward(self, obs: Tensor) -> tuple[Distribution, Tensor]:
        """Observations (B, ...) -> the distribution of actions, and the values (B,)."""
        obs = obs if self.normalize is None else self.normalize(obs)
        actor_features = self.actor_body(obs)
        critic_features = actor_features if self.critic_body is None else self.critic_body(obs)
        outputs, values = self.actor(actor_features), self.critic(critic_features).squeeze(-1)
        parameters = (outputs,) if self.log_std is None else (outputs, self.log_std)
        return self.make_distribution(*parameters), values


def compute_gae(
    rewards: Tensor,
    values: Tensor,
    next_values: Tensor,
    terminated: Tensor,
    truncated: Tensor,
    gamma: float,
    gae_lambda: float,
) -> tuple[Tensor, Tensor]:
    """Generalized advantage estimation (Schulman et al. 2016, https://arxiv.org/abs/1506.02438, eq. 16).

        delta_t = r_t + gamma V(s'_t) (1 - terminated_t) - V(s_t)
        A_t     = delta_t + gamma lambda (1 - (terminated_t or truncated_t)) A_{t+1}
        R_t     = A_t + V(s_t)

    A terminated step does not bootstrap; a truncated one bootstraps from the value of the final observation. Both stop
    the recursion, because the next step belongs to another episode.

    Args:
        rewards: (T, N), like all tensors here.
        values: V of the observation that each action was chosen from.
        next_values: V of the true successor: the final observation if the episode ended at that step.
        terminated: real ends of episodes.
        truncated: ends caused by a time limit.
        gamma: discount factor.
        gae_lambda: 0 trusts the values (one-step TD error), 1 the rewards (Monte Carlo).

    Returns:
        advantages (T, N) and returns (T, N), the targets of the values.

    Raises:
        ValueError: if the shapes differ.
    """
    require_same_shape(
        rewards=rewards, values=values, next_values=next_values, terminated=terminated, truncated=truncated
    )
    td_errors = rewards + gamma * next_values.where(~terminated.bool(), 0.0) - values
    continues = ~(terminated.bool() | truncated.bool())
    advantages = torch.zeros_like(td_errors)  # not like the rewards, which may be integers
    advantage = td_errors.new_zeros(td_errors.shape[1:])
    for t in reversed(range(len(rewards))):
        advantage = td_errors[t] + gamma * gae_lambda * advantage.where(continues[t], 0.0)
        advantages[t] = advantage
    return advantages, advantages + values


def clipped_surrogate_loss(
    log_prob: Tensor, old_log_prob: Tensor, advantages: Tensor, clip_coef: float | Tensor
) -> Tensor:
    """The policy's loss, L = -mean(min(r A, clip(r, 1 - eps, 1 + eps) A)) with r = pi(a|s) / pi_old(a|s) (eq. 7).

    Where A > 0 and r is above 1 + eps, or A < 0 and r below 1 - eps, the gradient is 0: the policy has moved enough.

    Args:
        log_prob: (B,) log pi(a|s), carries the gradient.
        old_log_prob: (B,) log pi_old(a|s).
        advantages: (B,).
        clip_coef: eps.

    Raises:
        ValueError: if the shapes differ.
    """
    require_same_shape(log_prob=log_prob, old_log_prob=old_log_prob, advantages=advantages)
    ratio = bounded_exponent(log_prob - old_log_prob).exp()
    clipped_ratio = ratio.clamp(1 - clip_coef, 1 + clip_coef)  # type: ignore[arg-type]  # both numbers or both tensors
    return -torch.min(ratio * advantages, clipped_ratio * advantages).mean()


def bounded_exponent(log_ratio: Tensor) -> Tensor:
    """Clamp log r so that r stays finite: an infinite r makes the clipped branch's gradient 0 * inf = NaN."""
    return log_ratio.clamp(max=math.log(torch.finfo(log_ratio.dtype).max) - 1)


def value_loss(
    values: Tensor, returns: Tensor, old_values: Tensor | None = None, clip_coef: float | None = None
) -> Tensor:
    """The value's loss, L = mean((V - R)^2).

    No factor 1/2, as in the paper and Stable-Baselines3; with CleanRL's 1/2 the same `vf_coef` weighs half as much.
    With both `old_values` and `clip_coef`, the loss is, element by element, the larger of those of V and of
    V_old + clip(V - V_old, -eps, eps), as in OpenAI's baselines.

    Args:
        values: (B,) V(s), carries the gradient.
        returns: (B,) R.
        old_values: (B,) V_old(s), from when the data were collected.
        clip_coef: eps.

    Raises:
        ValueError: if the shapes differ, or `clip_coef` comes without `old_values`.
    """
    require_same_shape(values=values, returns=returns)
    if old_values is not None:
        require_same_shape(values=values, old_values=old_values)
    squared_error = (values - returns).square()
    if clip_coef is None:
        return squared_error.mean()
    if old_values is None:
        raise ValueError("value clipping needs old_values to clip around")
    clipped_values = old_values + (values - old_values).clamp(-clip_coef, clip_coef)
    return torch.max(squared_error, (clipped_values - returns).square()).mean()


def ppo_loss(
    log_prob: Tensor,
    old_log_prob: Tensor,
    advantages: Tensor,
    values: Tensor,
    returns: Tensor,
    entropy: Tensor,
    *,
    clip_coef: float | Tensor,
    vf_coef: float,
    ent_coef: float,
    old_values: Tensor | None = None,
    value_clip_coef: float | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The whole loss, L = L_policy + c_vf L_value - c_ent mean(entropy) (PPO, eq. 9, negated to be minimised).

    All tensors are (B,), as in `clipped_surrogate_loss` and `value_loss`; `entropy` is that of pi(.|s).

    Returns:
        The loss (scalar), and detached scalars: `policy_loss`, `value_loss`, `entropy`, `approx_kl` (the estimate
        mean(r - 1 - log r), http://joschu.net/blog/kl-approx.html, never negative) and `clipfrac`, the share of
        samples whose ratio is outside the clip range.

    Raises:
        ValueError: if the shapes differ.
    """
    require_same_shape(log_prob=log_prob, values=values, entropy=entropy)
    policy_term = clipped_surrogate_loss(log_prob, old_log_prob, advantages, clip_coef)
    value_term = value_loss(values, returns, old_values, value_clip_coef)
    entropy_term = entropy.mean()
    loss = policy_term + vf_coef * value_term - ent_coef * entropy_term

    log_ratio = bounded_exponent(log_prob - old_log_prob).detach()
    ratio = log_ratio.exp()
    stats = {
        "policy_loss": policy_term.detach(),
        "value_loss": value_term.detach(),
        "entropy": entropy_term.detach(),
        "approx_kl": (log_ratio.expm1() - log_ratio).clamp(min=0).mean(),  # r - 1 would lose small values
        "clipfrac": ((ratio - 1).abs() > clip_coef).to(ratio.dtype).mean(),
    }
    return loss, stats


def normalized(advantages: Tensor) -> Tensor:
    """Return (A - mean) / std, (B,); 0 if all are equal, which is why one of them is subtracted first.

    Mean and std are over the whole minibatch of all ranks; CleanRL's `ppo_atari_multigpu.py` uses each rank's own.
    """
    whole = distributed.all_gather(advantages)
    shifted, whole = advantages - whole[0], whole - whole[0]
    # 1e-8 is 0 in float16.
    return (shifted - whole.mean()) / (whole.std() + 1e-8).clamp(min=torch.finfo(whole.dtype).tiny)


def make_agent(config: PPOConfig, observation_space: gym.Space[Any], action_space: gym.Space[Any]) -> ActorCritic:
    """Make the network that the settings ask for.

    Raises:
        ConfigError: if the spaces are not supported, or a setting does not apply to them.
    """
    if is_image(observation_space):
        require_default(config, "hidden_sizes", "activation", because="images go through the Nature CNN")
    else:
        require_default(config, "cnn_channels", because="only images go through a CNN")
    if not isinstance(action_space, gym.spaces.Box):
        require_default(config, "log_std_init", because="only actions that are numbers have a Gaussian")
    return ActorCritic(observation_space, action_space, config)


def act(agent: nn.Module, precision: torch.dtype, obs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Draw actions: observations (B, ...) -> actions (B, ...), their log-probabilities (B,) and the values (B,)."""
    with autocast(precision, obs.device):
        distribution, values = agent(obs)
    actions = distribution.sample()
    log_probs = distribution.log_prob(actions)
    require_same_shape(log_probs=log_probs, values=values)
    return actions, log_probs, values


@torch.no_grad()
def collect_rollout(
    agent: nn.Module,
    precision: torch.dtype,
    policy: Callable[[Tensor], tuple[Tensor, Tensor, Tensor]],
    envs: VectorEnv,
    obs: NDArray[Any],
    rollout: Rollout,
) -> tuple[NDArray[Any], list[tuple[int, Episode]]]:
    """Play T steps with the agent's policy (`act`), starting from `obs` (N, ...), and store them in `rollout`.

    Returns:
        The next `obs`, and each finished episode with the step t at which it ended.
    """
    obs, device, episodes = obs.copy(), rollout.device, list[tuple[int, Episode]]()
    final_values = torch.zeros(rollout.shape, device=device)  # of the final observations of truncated episodes

    def value(observations: NDArray[Any]) -> Tensor:
        with autocast(precision, device):
            values: Tensor = agent(observation_tensor(observations, device))[1]
        return values

    def choose(t: int, rows: slice) -> NDArray[Any]:
        observations = observation_tensor(obs[rows], device)
        actions, log_probs, values = policy(observations)
        arriving = fetch_async(actions)
        rollout.put(t, rows, observations=observations, actions=actions, log_probs=log_probs, values=values)
        return arriving()

    for t, rows, step in envs.play(rollout.shape[0], choose):  # calls choose(t, rows) for the actions of step t
        obs[rows] = step.observations
        rollout.put(t, rows, rewards=step.rewards, terminated=step.terminated, truncated=step.truncated)
        if step.truncated.any():
            cut = rows.start + np.flatnonzero(step.truncated)
            final_values[t, cut] = value(step.final_observations[step.truncated])
        episodes += [(t, episode) for episode in step.episodes]
    following = torch.cat([rollout["values"][1:], value(obs)[None]])
    # V(s'), of the final observation if the episode was truncated; if it terminated, `compute_gae` ignores V(s').
    rollout.add(next_values=torch.where(rollout["truncated"], final_values, following))
    return obs, episodes


@torch.no_grad()
def choose_actions(agent: nn.Module, obs: NDArray[Any], *, sample: bool = False) -> NDArray[Any]:
    """The most likely actions, or samples from the policy: observations (N, ...) -> (N, ...)."""
    distribution, _ = agent(observation_tensor(obs, next(agent.parameters()).device))
    actions: NDArray[Any] = (distribution.sample() if sample else distribution.mode).cpu().numpy()
    return actions


def minibatch_loss(
    agent: nn.Module, config: PPOConfig, precision: torch.dtype, batch: Columns, clip_coef: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of a minibatch, columns (B, ...), and its statistics to log."""
    with autocast(precision, clip_coef.device):
        distribution, values = agent(batch["observations"])
    return ppo_loss(
        distribution.log_prob(batch["actions"]),
        batch["log_probs"],
        normalized(batch["advantages"]) if config.norm_adv else batch["advantages"],
        values,
        batch["returns"],
        distribution.entropy(),
        clip_coef=clip_coef,
        vf_coef=config.vf_coef,
        ent_coef=config.ent_coef,
        old_values=batch["values"],
        value_clip_coef=config.value_clip_coef,
    )


def gradient_step(
    agent: nn.Module,
    optimizer: torch.optim.Optimizer,
    config: PPOConfig,
    precision: torch.dtype,
    samples: Columns,
    indices: Tensor,
    clip_coef: Tensor,
) -> dict[str, Tensor]:
    """Take one optimiser step on the samples `indices` (B,); return its statistics to log, by name.

    With several ranks, each passes its part of the minibatch.
    """
    batch = {name: column[indices] for name, column in samples.items()}
    loss, stats = minibatch_loss(agent, config, precision, batch, clip_coef)
    optimizer.zero_grad()
    loss.backward()
    distributed.average_gradients(optimizer)  # over all ranks, if there are several
    grad_norm = nn.utils.clip_grad_norm_(agent.parameters(), config.max_grad_norm, foreach=False)
    optimizer.step()
    return {**stats, "grad_norm": grad_norm}  # before clipping


def update_policy(
    step: Callable[[Columns, Tensor, Tensor], dict[str, Tensor]], samples: Columns, config: PPOConfig, clip_coef: float
) -> dict[str, float]:
    """Run `update_epochs` epochs of shuffled minibatches; return the means of their statistics to log.

    `step` is `gradient_step` with its first four arguments bound. Each rank shuffles its own samples and contributes an
    equal part of every minibatch.
    """
    device, batch_size = samples["advantages"].device, len(samples["advantages"])
    size = config.minibatch_size // distributed.world_size()
    clip = torch.full((), clip_coef, device=device)  # a float: compiled three times, not recorded on a GPU
    history: list[dict[str, Tensor]] = []
    for _ in range(config.update_epochs):
        for indices in torch.randperm(batch_size, device=device).split(size):
            history.append(step(samples, indices, clip))
        # Checked once per epoch, on its last minibatch, as in CleanRL; Stable-Baselines3 stops mid-epoch, at 1.5 x.
        if config.target_kl is not None and distributed.mean_over_ranks(history[-1]["approx_kl"]) > config.target_kl:
            break
    return mean_losses(history)


@distributed.process_group()
def train(
    config: PPOConfig, *, run_dir: str | Path | None = None, resume: bool = False, device: str = "auto"
) -> ActorCritic:
    """Train and return the network.

    Started by torchrun, each rank plays and learns from its share of the environments (`minirl.distributed`).

    Args:
        config: the settings.
        run_dir: where checkpoints and TensorBoard events go; None writes nothing.
        resume: continue from the checkpoint in `run_dir`, as if the run had not stopped.
        device: `auto`, `cpu` or `cuda`.

    Raises:
        ConfigError: if the environment, the device or the run directory can't be used.
        EnvError: if the environment fails.
        KeyboardInterrupt: on Ctrl-C, after saving; its subclass `Stopped` on SIGTERM, SIGHUP or a closed stderr.
    """
    torch_device = select_device(device)
    distributed.require_shares(num_envs=config.num_envs, minibatch_size=config.minibatch_size)
    mine = distributed.my_share(config.num_envs)
    run_dir, saved = saved_run("ppo", config, run_dir, resume, "envs", "obs")
    first_step: int = saved["global_step"] if saved else 0
    last_step = config.num_updates * config.batch_size
    videos = Videos(config, run_dir, first_step)
    seed_everything(config.seed)
    with make_envs_of(config, mine, in_halves=True) as envs:
        agent = make_agent(config, envs.observation_space, envs.action_space).to(torch_device).eval()
        optimizer = torch.optim.Adam(agent.parameters(), lr=config.learning_rate, eps=1e-5, fused=True)
        rates = [group["lr"] for group in optimizer.param_groups]
        # What a checkpoint holds: add a line here to save and load anything with `state_dict` and `load_state_dict`.
        learned: dict[str, Part] = {"model": agent, "optimizer": optimizer}
        if config.norm_reward:
            learned["norm_reward"] = norm_reward = NormalizeReward(config.num_envs, config.gamma)
        rollout = Rollout(config.num_steps, envs.num_envs, torch_device)

        images = is_image(envs.observation_space)
        precision = select_precision(config.precision, torch_device, images=images)
        pays = pays_off(config.compile, config.num_gradient_steps, images=images)
        policy = compiled(act, agent, precision, enabled=pays)
        step = compiled(gradient_step, agent, optimizer, config, precision, enabled=pays)
        gae = cuda_graphed(compute_gae, torch_device)
        in_training = InTraining(agent)  # batch norm learns and dropout is on in updates only, as in Stable-Baselines3

        load_parts(learned, saved)
        obs = start_envs(envs, config.seed, saved)
        # Allocates the largest column now: a lack of memory shows before the run directory is written.
        rollout.put(0, slice(None), observations=observation_tensor(obs, torch_device))

        def state() -> State:
            return {**save_parts(learned), **env_state(envs, obs)}

        with Run("ppo", config, run_dir, agent, total=last_step, done=first_step, resumed=saved) as run:
            run.checkpoint(first_step, state)
            for update in range(first_step // config.batch_size, config.num_updates):
                remaining = 1 - update / config.num_updates
                clip_coef = config.clip_coef * (remaining if config.anneal_clip else 1)
                if config.anneal_lr:
                    for group, rate in zip(optimizer.param_groups, rates, strict=True):
                        group["lr"] = rate * remaining

                with acting(agent, precision):
                    obs, episodes = collect_rollout(agent, precision, policy, envs, obs, rollout)
                for t, episode in episodes:
                    run.log_episodes(update * config.batch_size + (t + 1) * config.num_envs, [episode])
                if config.norm_reward:
                    rollout.normalize_rewards(norm_reward)
                columns = (rollout[name] for name in ("rewards", "values", "next_values", "terminated", "truncated"))
                advantages, returns = gae(*columns, config.gamma, config.gae_lambda)
                samples = rollout.samples(advantages=advantages, returns=returns)
                with in_training:
                    losses = update_policy(step, samples, config, clip_coef)
                require_finite_losses(losses, "update", update + 1)
                if config.norm_obs and agent.normalize is not None:
                    # Only after the update: until then the policy that learns must be the one that played.
                    agent.normalize.update(samples["observations"])

                global_step = (update + 1) * config.batch_size
                losses["losses/explained_variance"] = explained_variance(
                    distributed.all_gather(rollout["values"]), distributed.all_gather(returns)
                )
                run.log(global_step, {"charts/learning_rate": float(optimizer.param_groups[0]["lr"]), **losses})
                videos.record(run, global_step, lambda obs: choose_actions(agent, obs))
                run.checkpoint(global_step, state, finished=global_step == last_step)
    return agent
