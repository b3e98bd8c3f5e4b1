"""Where and how the arithmetic runs."""

import torch

from minirl.config import ConfigError


def select_device(name: str) -> torch.device:
    """Turn `auto`, `cpu` or `cuda` into a device; `auto` takes CUDA where there is one.

    Raises:
        ConfigError: if CUDA is asked for and there is none, or the name is another.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name not in ("cpu", "cuda"):
        raise ConfigError(f"--device must be auto, cpu or cuda, not {name!r}")
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda must have a GPU that PyTorch can use: there is none here; use cpu or auto")
    return torch.device(name)
