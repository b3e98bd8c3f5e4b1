"""Small networks in NumPy, to act with: for a few observations the arithmetic is nothing, and each call of torch costs.

Two hidden layers of 24 take 9 microseconds instead of 30, which counts where each step looks at one observation.
Training stays torch's: these functions work on the memory of its weights, and follow them as they are trained.
"""

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

Layer = Callable[[NDArray[np.float32]], NDArray[np.float32]]


def in_numpy(*modules: nn.Module) -> Layer | None:
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


def _layer(module: nn.Module) -> Layer | None:
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


def probe(network: nn.Module) -> Tensor:
    """Return a few inputs (3, n) to ask a network and its layers in NumPy whether they still say the same.

    They don't where `forward` was changed and does more than its layers: then it is the network that must act.
    """
    num_inputs = next(network.parameters()).shape[1]
    return torch.linspace(-1, 1, 3 * num_inputs).reshape(3, num_inputs)


def close(numpys: NDArray[np.float32], torchs: Tensor) -> bool:
    """Whether both say the same, to more than rounding."""
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
