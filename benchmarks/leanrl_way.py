"""PPO on Pong as LeanRL does it, for comparison: CleanRL's loop, with all its computation compiled and recorded.

Rewritten from its description: a flat script in which acting and the minibatch step are functions compiled by
`torch.compile` (with a graph break at `loss.backward()`), and these and the advantages are replayed as CUDA graphs;
float32, with convolutions in TF32, PyTorch's default; each step copies observations to the GPU and actions back. It
plays in this project's environments instead of LeanRL's EnvPool, so that the ratio is about the rest.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from minirl.envs.make import make_vector_env
from minirl.fast.gpu import cuda_graphed

STEPS, EPOCHS, GAMMA, LAMBDA = 128, 4, 0.99, 0.9
CLIP, ENTROPY, VALUE, RATE = 0.1, 0.01, 0.5, 2.5e-4


class Agent(nn.Module):
    """The Nature CNN, as CleanRL writes it."""

    def __init__(self, num_actions: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(4, 32, 8, stride=4),
            nn.ReLU(),
            nn.Conv2d(32, 64, 4, stride=2),
            nn.ReLU(),
            nn.Conv2d(64, 64, 3),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(3136, 512),
            nn.ReLU(),
        )
        self.actor, self.critic = nn.Linear(512, num_actions), nn.Linear(512, 1)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Bytes (B, 4, 84, 84) -> log-probabilities (B, A) and values (B,)."""
        features = self.body(images / 255)
        return self.actor(features).log_softmax(-1), self.critic(features).squeeze(-1)


def train_lean(num_envs: int, minibatch: int, device: torch.device, look: Callable[[int], None]) -> None:
    """Train until `look`, which is called with the agent steps after each update, raises."""
    torch.manual_seed(1)
    with make_vector_env("PongNoFrameskip-v4", num_envs) as envs:
        agent = Agent(6).to(device)
        rate = torch.tensor(RATE, device=device)
        optimizer = torch.optim.Adam(agent.parameters(), lr=rate, eps=1e-5, capturable=device.type == "cuda")

        def act(images: Tensor) -> Sequence[Tensor]:
            log_probs, values = agent(images)
            actions = (log_probs.exp() / torch.empty_like(log_probs).exponential_()).argmax(-1)
            return actions, log_probs.gather(-1, actions[:, None]).squeeze(-1), values

        def gae(rewards: Tensor, dones: Tensor, values: Tensor, last: Tensor) -> Sequence[Tensor]:
            advantages, advantage, following = [], torch.zeros_like(last), last
            for reward, done, value in zip(rewards.flip(0), dones.flip(0), values.flip(0), strict=True):
                goes_on = 1 - done
                advantage = reward + GAMMA * following * goes_on - value + GAMMA * LAMBDA * goes_on * advantage
                advantages.append(advantage)
                following = value
            result = torch.stack(advantages[::-1])
            return result, result + values

        def update(
            images: Tensor, actions: Tensor, old: Tensor, advantages: Tensor, returns: Tensor
        ) -> Sequence[Tensor]:
            optimizer.zero_grad()
            log_probs, values = agent(images)
            advantages = (advantages - advantages.mean()) / (advantages.std() + 1e-8)
            ratio = (log_probs.gather(-1, actions[:, None]).squeeze(-1) - old).exp()
            policy = torch.max(-advantages * ratio, -advantages * ratio.clamp(1 - CLIP, 1 + CLIP)).mean()
            entropy = -(log_probs.exp() * log_probs).sum(-1).mean()
            value = F.mse_loss(values, returns)
            (policy + VALUE * value - ENTROPY * entropy).backward()
            norm = nn.utils.clip_grad_norm_(agent.parameters(), 0.5)
            optimizer.step()
            return torch.stack([policy, value, entropy, norm]).detach(), ratio.detach()

        fast_act, fast_gae = cuda_graphed(torch.compile(act), device), cuda_graphed(gae, device)
        fast_update = cuda_graphed(torch.compile(update), device)
        images = torch.as_tensor(envs.reset(seed=1).copy()).to(device)
        steps = 0
        while True:
            columns: list[tuple[Tensor, ...]] = []
            rewards, dones = torch.zeros(2, STEPS, num_envs)
            with torch.no_grad():
                for t in range(STEPS):
                    actions, log_probs, values = fast_act(images)
                    columns.append((images, actions, log_probs, values))
                    played = envs.step(actions.cpu().numpy())
                    rewards[t] = torch.as_tensor(played.rewards)
                    dones[t] = torch.as_tensor(played.terminated | played.truncated)
                    images = torch.as_tensor(played.observations.copy()).to(device, non_blocking=True)
                pixels, actions, log_probs, values = (torch.stack(column) for column in zip(*columns, strict=True))
                last = fast_act(images)[2]
                advantages, returns = fast_gae(rewards.to(device), dones.to(device), values, last)
            batch = [column.flatten(0, 1) for column in (pixels, actions, log_probs, advantages, returns)]
            logged: list[Tensor] = []
            for _ in range(EPOCHS):
                for chosen in torch.randperm(STEPS * num_envs, device=device).split(minibatch):
                    logged.append(fast_update(*(column[chosen] for column in batch))[0])
            torch.stack(logged).mean(0).tolist()
            steps += STEPS * num_envs
            look(steps)
