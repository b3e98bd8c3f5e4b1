"""Q-learning, Double DQN, PPO and RLHF from scratch: one algorithm, one module.

Importing the package imports no torch, so that environment workers stay small.
"""

import gymnasium

__version__ = "0.1.0"

# The limit is far beyond what learning needs (the way to the goal has four steps); it ends a policy that walks in
# circles.
gymnasium.register("minirl/GridWorld-v0", "minirl.envs.gridworld:GridWorld", max_episode_steps=1000)
