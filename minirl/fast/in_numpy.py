"""Small networks in NumPy, to act with: for a few observations the arithmetic is nothing, and each call of torch costs.

Two hidden layers of 24 take 9 microseconds instead of 30, which counts where each step looks at one observation.
Training stays torch's: these functions work on the memory of its weights, and follow them as they are trained.
"""

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.distributions import Categorical

Layer = Callable[[NDArray[np.float32]], NDArray[np.float32]]
Policy = Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]


def in_numpy(*modules: nn.Module | None) -> Layer | None:
    """Return modules, one after the other, as a function of inputs (B, n), the same to rounding.

    None where one is neither a linear layer on the CPU nor ReLU, tanh or a sequence of these: then torch must do it.
    """
    layers: list[Layer] = []
    for module in modules:
        layer = _layer(module)
        if layer is None:
            return None
        layers.append(layer)

    def run(inputs: NDArray[np.float32]) -> NDArray[np.float32]:
        for layer in layers:
            inputs = layer(inputs)
        return inputs

    return run


def _layer(module: nn.Module | None) -> Layer | None:
    # Exactly these types: a subclass may compute something else.
    if type(module) is nn.Sequential:
        return in_numpy(*module)
    if type(module) is nn.ReLU:
        return lambda inputs: np.maximum(inputs, 0)
    if type(module) is nn.Tanh:
        return np.tanh
    if type(module) is nn.Linear and module.bias is not None and module.weight.device.type == "cpu":
        weight, bias = module.weight.detach().numpy().T, module.bias.detach().numpy()
        return lambda inputs: inputs @ weight + bias
    return None


def q_function_in_numpy(network: nn.Module, *layers: nn.Module) -> Layer | None:
    """Return the layers of a network that gives values (B, A) in NumPy, or None where torch must do it.

    So it must where `forward` was changed and does more than its layers: both are asked, and compared.
    """
    function = in_numpy(*layers)
    if function is None or not _close(function(_probe(network).numpy()), network(_probe(network))):
        return None
    return function


def policy_in_numpy(
    agent: nn.Module, actor: tuple[nn.Module | None, ...], critic: tuple[nn.Module | None, ...]
) -> Policy | None:
    """Return a policy as a function of observations (B, n): drawn actions, log-probabilities and values, all (B,).

    None where torch must do it, as in `q_function_in_numpy`. The draws are those of `Categorical.sample`.

    Args:
        agent: observations -> a `Categorical`, and values (B,).
        actor: its layers from observations to logits.
        critic: those from observations to values (B, 1).
    """
    logits_of, values_of = in_numpy(*actor), in_numpy(*critic)
    if logits_of is None or values_of is None:
        return None
    obs = _probe(agent)
    distribution, values = agent(obs)
    likeliest, log_probs = sample_in_numpy(logits_of(obs.numpy()), np.ones(distribution.logits.shape, np.float32))
    same = _close(log_probs, distribution.log_prob(torch.from_numpy(likeliest)))
    if not same or not _close(values_of(obs.numpy())[:, 0], values):
        return None

    def policy(obs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return *_draw(logits_of(obs.numpy())), torch.from_numpy(values_of(obs.numpy())[:, 0])

    return policy


def draw(distribution: Categorical) -> tuple[Tensor, Tensor]:
    """Draw actions (B,), and return their log-probabilities (B,) with them, the same as `Categorical.sample` does.

    On the CPU it takes a third of torch's time; on a GPU nothing waits for it.
    """
    logits = distribution.logits.detach()
    if logits.device.type == "cpu":
        return _draw(logits.numpy())
    actions = first_to_ring(logits)
    return actions, distribution.log_prob(actions)


def first_to_ring(log_probs: Tensor) -> Tensor:
    """Draw as `torch.multinomial` does, but for its checks, two, each of which waits for a GPU: (B, A) -> (B,)."""
    return (log_probs.exp() / torch.empty_like(log_probs).exponential_()).argmax(dim=-1)


def _draw(logits: NDArray[np.float32]) -> tuple[Tensor, Tensor]:
    actions, log_probs = sample_in_numpy(logits, torch.empty(logits.shape).exponential_().numpy())
    return torch.from_numpy(actions), torch.from_numpy(log_probs)


def _probe(network: nn.Module) -> Tensor:
    """A few inputs (3, n), always the same."""
    num_inputs = next(network.parameters()).shape[1]
    return torch.linspace(-1, 1, 3 * num_inputs).reshape(3, num_inputs)


def _close(numpys: NDArray[np.float32], torchs: Tensor) -> bool:
    return numpys.shape == torchs.shape and np.allclose(numpys, torchs.detach().numpy(), rtol=1e-3, atol=1e-3)


def sample_in_numpy(
    logits: NDArray[np.float32], exponential: NDArray[np.float32]
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Draw from softmax(logits): of clocks that ring at the rates of the probabilities, the first to ring.

    The same actions as `torch.multinomial` draws, from the same random numbers.

    Args:
        logits: (B, A).
        exponential: (B, A) random numbers, exponentially distributed.

    Returns:
        The actions (B,) and their log-probabilities (B,).
    """
    shifted = logits - logits.max(axis=-1, keepdims=True)
    log_probs = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    actions: NDArray[np.int64] = (np.exp(log_probs) / exponential).argmax(axis=-1)
    return actions, log_probs[np.arange(len(actions)), actions]
