"""The LSTM by its equations, starts, whole sequences in the minibatches, and gradients through time."""

from typing import Any

import gymnasium as gym
import numpy as np
import torch
from torch import Tensor

from minirl.envs.make import make_env
from minirl.ppo import HIDDEN, ActorCritic, PPOConfig, act, choose_actions, minibatch_loss, update_policy

T, N = 5, 3


def agent_and_steps() -> tuple[ActorCritic, Tensor]:
    """Return an agent and T steps of N games, (T, N, 3): two numbers, and the mark of a start."""
    torch.manual_seed(0)
    obs = torch.randn(T, N, 3)
    obs[..., -1] = 0
    obs[0, 0, -1] = obs[2, 1, -1] = obs[4, 1, -1] = obs[3, 2, -1] = 1
    return ActorCritic(gym.spaces.Box(-9, 9, (3,), np.float32), gym.spaces.Discrete(2)), obs


def one_by_one(agent: Any, obs: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """Return logits (T, N, A) and values (T, N) by the equations of the LSTM, game by game."""
    logits, values = torch.zeros(T, N, 2), torch.zeros(T, N)
    cell = agent.lstm
    for env in range(N):
        hidden, memory = state[env, :HIDDEN], state[env, HIDDEN:]
        for t in range(T):
            if obs[t, env, -1] == 1:
                hidden, memory = torch.zeros(HIDDEN), torch.zeros(HIDDEN)
            seen = torch.tanh(agent.body[0].weight @ obs[t, env, :-1] + agent.body[0].bias)
            gates = cell.weight_ih @ seen + cell.bias_ih + cell.weight_hh @ hidden + cell.bias_hh
            take, keep, new, show = gates.split(HIDDEN)
            memory = torch.sigmoid(keep) * memory + torch.sigmoid(take) * torch.tanh(new)
            hidden = torch.sigmoid(show) * torch.tanh(memory)
            logits[t, env] = (agent.actor.weight @ hidden + agent.actor.bias).log_softmax(dim=-1)
            values[t, env] = (agent.critic.weight @ hidden + agent.critic.bias).squeeze()
    return logits, values


def test_sequences_are_the_equations_step_by_step() -> None:
    agent, obs = agent_and_steps()
    state = torch.randn(N, 2 * HIDDEN)
    with torch.no_grad():
        distribution, values, _ = agent(obs.flatten(0, 1), state)
        logits, expected = one_by_one(agent, obs, state)
        torch.testing.assert_close(distribution.logits.view(T, N, 2), logits)
        torch.testing.assert_close(values.view(T, N), expected)
        for t in range(T):  # playing carries the state along
            _, log_prob, value, state = act(agent, torch.float32, obs[t], state)
            torch.testing.assert_close(value, expected[t])
            assert log_prob.shape == (N,)


def test_the_gradient_goes_back_to_the_start_of_an_episode_and_no_further() -> None:
    agent, obs = agent_and_steps()
    obs.requires_grad_()
    _, values, _ = agent(obs.flatten(0, 1), torch.zeros(N, 2 * HIDDEN))
    values.view(T, N)[-1].sum().backward()
    assert obs.grad is not None
    reached = (obs.grad[..., :-1] != 0).any(dim=-1)
    assert reached.T.tolist() == [[True] * 5, [False] * 4 + [True], [False] * 3 + [True] * 2]


def test_what_was_played_is_learned_from_as_it_was_played() -> None:
    agent, obs = agent_and_steps()
    state, columns = torch.randn(N, 2 * HIDDEN), []
    with torch.no_grad():
        for t in range(T):
            before = state
            actions, log_probs, values, state = act(agent, torch.float32, obs[t], state)
            columns.append((obs[t], before, actions, log_probs, values))
    names = ("observations", "states", "actions", "log_probs", "values")
    samples = dict(zip(names, map(torch.cat, zip(*columns, strict=True)), strict=True))
    samples |= {"advantages": torch.randn(T * N), "returns": samples["values"] + 2.0}
    config = PPOConfig(num_envs=N, num_steps=T, minibatch_size=T, update_epochs=2)
    seen: list[list[int]] = []

    def step(columns: dict[str, Tensor], chosen: Tensor, clip_coef: Tensor) -> dict[str, Tensor]:
        seen.append(chosen.tolist())
        batch = {name: column[chosen] for name, column in columns.items()}
        _, stats = minibatch_loss(agent, config, torch.float32, batch, clip_coef)
        assert stats["approx_kl"] < 1e-10  # the same policy, with the same state
        torch.testing.assert_close(stats["value_loss"], torch.tensor(4.0))
        return stats

    update_policy(step, samples, config, 0.1)
    sequences = [[t * N + env for t in range(T)] for env in range(N)]
    assert sorted(seen[:N]) == sorted(seen[N:]) == sequences


def test_environments_mark_the_first_observation_of_an_episode() -> None:
    env = make_env("CartPole-v1")
    assert env.observation_space.shape == (5,)
    for seed in (0, None):
        obs, _ = env.reset(seed=seed)
        marks, ended = [obs[-1]], False
        while not ended:
            obs, _, terminated, truncated, _ = env.step(1)
            ended = terminated or truncated
            marks.append(obs[-1])
        assert marks == [1] + [0] * (len(marks) - 1)
        assert env.observation_space.contains(obs)


def test_evaluation_carries_its_state_from_step_to_step() -> None:
    agent, obs = agent_and_steps()
    torch.nn.init.normal_(agent.actor.weight)
    obs[0, :, -1] = 1  # games start
    logits, _ = one_by_one(agent, obs, torch.zeros(N, 2 * HIDDEN))
    for _ in range(2):  # a second evaluation finds the state of the first, and masks it
        for t in range(T):
            assert choose_actions(agent, obs[t].numpy()).tolist() == logits[t].argmax(dim=-1).tolist()
    assert len(choose_actions(agent, obs[0, :1].numpy())) == 1
