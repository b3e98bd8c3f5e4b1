"""Running mean and variance, and what is normalised by them: observations and rewards."""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from minirl.distributed import all_gather, mean_over_ranks, my_share, world_size

EPSILON, CLIP = 1e-8, 10.0  # as in Stable-Baselines3


class RunningMeanStd(nn.Module):
    """Running mean and variance, element by element, in float64; a checkpoint holds them.

    Args:
        shape: of one sample.
    """

    mean: Tensor
    variance: Tensor
    count: Tensor

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(shape, dtype=torch.float64))
        self.register_buffer("variance", torch.ones(shape, dtype=torch.float64))
        self.register_buffer("count", torch.zeros((), dtype=torch.float64))

    def update(self, batch: Tensor) -> None:
        """Add a batch, (B, ...) of each rank, in one go (Chan et al. 1979, http://i.stanford.edu/pub/cstr/reports/cs/tr/79/773).

        M2 = M2_a + M2_b + (mean_b - mean_a)^2 n_a n_b / (n_a + n_b),  variance = M2 / n
        """
        batch = batch.double()
        mean, size = mean_over_ranks(batch.mean(dim=0)), len(batch) * world_size()
        count = self.count + size
        share = size / count
        distance = mean - self.mean
        self.variance.mul_(1 - share).add_(share * mean_over_ranks((batch - mean).square().mean(dim=0)))
        self.variance.add_(distance.square() * share * (1 - share))
        self.mean.add_(distance * share)
        self.count.copy_(count)


class NormalizeObservation(RunningMeanStd):
    """Shifts and scales vectors (B, n) by the running mean and variance, to mean 0 and variance 1; clips them to +-10.

    As Gymnasium's wrapper and Stable-Baselines3's `VecNormalize`, but as a layer: loading the network also loads its
    statistics. They change only when `update` is called.
    """

    def forward(self, obs: Tensor) -> Tensor:
        """(B, n) -> (B, n); before the first `update` it only clips."""
        scaled = (obs - self.mean) * (self.variance + EPSILON).rsqrt()
        return scaled.clamp(-CLIP, CLIP).to(obs.dtype)


class NormalizeReward(RunningMeanStd):
    """Divides rewards by the running standard deviation of the discounted return, and clips them to +-10.

        G_t = r_t + gamma G_{t-1} in each environment, restarted after an end;  r_t / sqrt(variance of all G up to t)

    As in Gymnasium's wrapper and Stable-Baselines3's `VecNormalize`, no mean is subtracted: that changes what is best.

    Args:
        num_envs: N, over all ranks.
        gamma: the discount factor.
    """

    discounted: Tensor

    def __init__(self, num_envs: int, gamma: float) -> None:
        super().__init__(())
        self.gamma = gamma
        self.register_buffer("discounted", torch.zeros(num_envs, dtype=torch.float64))

    def forward(self, rewards: NDArray[Any], ended: NDArray[np.bool_]) -> NDArray[Any]:
        """Add the rewards (T, N) of some steps; return them (float32), normalised step by step.

        Args:
            rewards: of this rank's environments, in the order in which they were played.
            ended: (T, N), whether an episode ended.
        """
        mine = my_share(len(self.discounted))
        rewards, ended = (all_gather(torch.from_numpy(column.T)).numpy().T for column in (rewards, ended))
        discounted: NDArray[Any] = self.discounted.numpy()
        history: NDArray[Any] = np.empty(rewards.shape)
        for t, (paid, over) in enumerate(zip(rewards, ended, strict=True)):
            history[t] = discounted * self.gamma + paid
            discounted = np.where(over, 0.0, history[t])
        # The variance after each step, from cumulative sums of distances to a central point, and of their squares.
        count, place = float(self.count), history.mean()
        counts = count + history.shape[1] * np.arange(1, len(history) + 1)
        before = float(self.mean) - place
        sums = count * before + (history - place).sum(axis=1).cumsum()
        squares = count * (float(self.variance) + before**2) + np.square(history - place).sum(axis=1).cumsum()
        variances = np.maximum(squares / counts - np.square(sums / counts), 0)
        self.discounted.copy_(torch.from_numpy(discounted))
        self.update(torch.from_numpy(history[:, mine].ravel()))
        scaled: NDArray[Any] = rewards / np.sqrt(variances + EPSILON)[:, None]
        return scaled[:, mine].clip(-CLIP, CLIP).astype(np.float32)
