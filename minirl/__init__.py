"""Q-learning, Double DQN and PPO from scratch: one algorithm, one module.

Importing the package imports no torch, so that environment workers stay small.
"""

__version__ = "0.1.0"
