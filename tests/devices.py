"""Where what trains is tested: on the processor, and on a GPU where there is one."""

import torch

DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
