"""The bonus's gradient by hand, with another weight each time, plain and compiled; and the weights of a training."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from minirl import ppo
from minirl.fast.compiled import compiled
from minirl.networks import Categorical


class Fixed(nn.Module):
    """The same policy everywhere, and no value."""

    def __init__(self) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(2))

    def forward(self, obs: Tensor) -> tuple[Categorical, Tensor]:
        """Observations (B, 1) -> pi, and V (B,)."""
        return Categorical(logits=self.logits.expand(len(obs), 2)), 0 * obs[:, 0]


@pytest.mark.parametrize("enabled", [False, True])
def test_each_weight_is_seen(enabled: bool) -> None:
    """With p = (3/4, 1/4), dH/dz = 3/16 log 3 (-1, 1): p_k times -log p_k - H, and H + log p_0 = log(3) / 4."""
    config = ppo.PPOConfig(num_envs=1, num_steps=4, minibatch_size=4, norm_adv=False, max_grad_norm=100.0)
    agent, start = Fixed(), torch.tensor([math.log(3), 0.0])
    optimizer = torch.optim.SGD(agent.parameters(), lr=1.0)
    step = compiled(ppo.gradient_step, agent, optimizer, config, torch.float32, enabled=enabled)
    names = ("advantages", "returns", "values")
    samples: dict[str, Tensor] = {name: torch.zeros(4) for name in names}
    samples["observations"], samples["actions"] = torch.ones(4, 1), torch.zeros(4, dtype=torch.int64)
    samples["log_probs"] = torch.full((4,), math.log(3 / 4))
    for weight in [0.5, 0.4, 0.3, 0.2, 0.1, 0.09, 0.08, 0.07, 0.06, 0.05, 0.0]:  # more than PyTorch compiles versions
        agent.ent_coef = weight
        agent.logits.data.copy_(start)
        step(samples, torch.arange(4), torch.tensor(0.1))
        moved = agent.logits.detach() - start
        slope = 3 / 16 * math.log(3)
        torch.testing.assert_close(moved, weight * torch.tensor([-slope, slope]), rtol=1e-4, atol=1e-6)


def test_the_weight_falls_from_update_to_update(monkeypatch: pytest.MonkeyPatch) -> None:
    """0.3 in the first of three updates, then two thirds and one third of it; two gradient steps in each."""
    seen: list[float] = []
    loss = ppo.ppo_loss

    def spy(*arguments: Any, **options: Any) -> Any:
        seen.append(options["ent_coef"])
        return loss(*arguments, **options)

    monkeypatch.setattr(ppo, "ppo_loss", spy)
    sizes: dict[str, Any] = {"num_envs": 2, "num_steps": 4, "minibatch_size": 4, "update_epochs": 1}
    config = ppo.PPOConfig("CartPole-v1", total_timesteps=24, ent_coef=0.3, anneal_ent=True, compile=False, **sizes)
    ppo.train(config, device="cpu")
    assert seen == pytest.approx([0.3, 0.3, 0.2, 0.2, 0.1, 0.1])
