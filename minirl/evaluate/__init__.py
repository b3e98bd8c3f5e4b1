"""Play full, unclipped games with what a run has learned: `python -m minirl.evaluate RUN_DIR`.

On Atari the games come with the preprocessing of the training (FIRE is pressed after a lost life, say), while the
returns are the real scores of whole games.
"""

import contextlib
import functools
import json
import statistics
import sys
from pathlib import Path
from typing import Any

import cv2
import gymnasium as gym
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from minirl.checkpoints import BEST_FILE, CHECKPOINT_FILE, load_checkpoint, load_weights
from minirl.cli import Parser, fail, reader, saved_config
from minirl.config import MAX_SEED, ConfigError
from minirl.dqn import DQNConfig, greedy_actions, make_q_network
from minirl.envs.ids import is_atari
from minirl.envs.make import make_env, make_vector_env
from minirl.envs.vector import VectorEnv
from minirl.networks import observation_dtype
from minirl.play import SIDE_BY_SIDE, Policy, play_games
from minirl.ppo import ActorCritic
from minirl.progress import Progress
from minirl.q_learning import load_table
from minirl.runs import load_settings, seed_everything
from minirl.runtime import select_device

SEED_OFFSET = 10_000  # from the seed of the training, so that other games are played than were trained on
ATARI_STEPS_PER_SECOND = 15  # 60 frames, 4 of them an agent step


def evaluate(
    run_dir: str | Path,
    *,
    episodes: int = 100,
    seed: int | None = None,
    stochastic: bool = False,
    video: str | Path | None = None,
    last: bool = False,
    device: str = "auto",
) -> dict[str, Any]:
    """Play `episodes` games and return what `--json` prints.

    Where the training has picked a best network (`best.pt`, from DQN), that one plays; otherwise the last.

    Args:
        run_dir: the directory of a run.
        episodes: games to play.
        seed: of the games and of sampled actions; None for the seed of the training plus 10,000.
        stochastic: sample actions from PPO's policy; otherwise always take the likeliest.
        video: record a game, in colour, to this `.mp4`: the first of the first environment if actions are greedy.
        last: play with the last network though there is a best one.
        device: `auto`, `cpu` or `cuda`.

    Returns:
        `mean_return`, `std_return` (of these games: divided by n), `min_return`, `max_return`, `episodes`, `returns`.

    Raises:
        ConfigError: if the run or an argument will not do.
    """
    if episodes < 1:
        raise ConfigError(f"--episodes must be a whole number of at least 1, not {episodes}")
    if seed is not None and not 0 <= seed <= MAX_SEED:
        raise ConfigError(f"--seed must be a whole number from 0 to {MAX_SEED}, not {seed}")
    video = None if video is None else Path(video)
    if video is not None and (video.suffix != ".mp4" or not video.parent.is_dir()):
        raise ConfigError(f"--video must be a file that ends in .mp4, in a directory that exists, not {video}")
    run_dir = Path(run_dir)
    settings = load_settings(run_dir)
    torch_device = select_device(device)
    if seed is None:
        seed = (int(settings["seed"]) + SEED_OFFSET) % (MAX_SEED + 1)
    with make_vector_env(settings["env_id"], min(episodes, SIDE_BY_SIDE)) as envs:
        policy = load_policy(run_dir, settings, envs, stochastic, last, torch_device)
        if video is not None:
            seed_everything(seed)
            record_game(policy, settings["env_id"], seed, video)
        seed_everything(seed)
        with contextlib.closing(Progress(episodes, unit="games")) as progress:
            returns = play_games(policy, envs, episodes, seed, progress)
    return {
        "mean_return": statistics.fmean(returns),
        "std_return": statistics.pstdev(returns),
        "min_return": min(returns),
        "max_return": max(returns),
        "episodes": episodes,
        "returns": returns,
    }


def load_policy(
    run_dir: Path, settings: dict[str, Any], envs: VectorEnv, stochastic: bool, last: bool, device: torch.device
) -> Policy:
    """Return the saved network or table as a function from observations to actions.

    Raises:
        ConfigError: if there is none, or `stochastic` is asked of an algorithm that has no distribution to sample from.
    """
    algorithm = settings["algorithm"]
    if stochastic and algorithm != "ppo":
        raise ConfigError(f"--stochastic must go with a run of ppo: {algorithm} has no probabilities to sample from")
    if algorithm == "ppo":
        return ppo_policy(run_dir, envs, stochastic, device)
    if algorithm == "dqn":
        return dqn_policy(run_dir, settings, envs, last, device)
    if algorithm == "q_learning":
        return q_learning_policy(run_dir, envs)
    raise ConfigError(f"{run_dir} must hold a run of ppo, dqn or q_learning, not of {algorithm}")


def ppo_policy(run_dir: Path, envs: VectorEnv, stochastic: bool, device: torch.device) -> Policy:
    """Return PPO's network as a policy: its likeliest actions, or sampled ones."""
    saved = load_checkpoint(run_dir, "ppo", "model")
    agent = ActorCritic(envs.observation_space, envs.action_space).to(device)
    load_weights(agent, saved)
    dtype = observation_dtype(envs.observation_space)

    @torch.no_grad()
    def policy(observations: NDArray[Any]) -> NDArray[np.int64]:
        distribution, _ = agent(torch.as_tensor(observations, dtype=dtype, device=device))
        actions: Tensor = distribution.sample() if stochastic else distribution.logits.argmax(dim=-1)
        result: NDArray[np.int64] = actions.cpu().numpy()
        return result

    return policy


def dqn_policy(run_dir: Path, settings: dict[str, Any], envs: VectorEnv, last: bool, device: torch.device) -> Policy:
    """Return DQN's network, the best if there is one, as a policy: the first of its best actions."""
    file = CHECKPOINT_FILE if last or not (run_dir / BEST_FILE).exists() else BEST_FILE
    saved = load_checkpoint(run_dir, "dqn", "model", file=file)
    network = make_q_network(saved_config(DQNConfig, run_dir, settings), envs, device)
    load_weights(network, saved)
    print(f"network: {file}, of agent step {saved['global_step']:,}", file=sys.stderr)
    return functools.partial(greedy_actions, network)


def q_learning_policy(run_dir: Path, envs: VectorEnv) -> Policy:
    """Return a Q-table as a policy: the first of the best actions."""
    table = load_table(load_checkpoint(run_dir, "q_learning", "q_table"), envs)

    def policy(observations: NDArray[Any]) -> NDArray[np.int64]:
        best: NDArray[np.int64] = table[observations].argmax(axis=-1)
        return best

    return policy


def record_game(policy: Policy, env_id: str, seed: int, path: Path) -> None:
    """Play one whole game and write it, in colour, to an `.mp4` file at the speed of the game.

    Raises:
        ConfigError: if the environment can't be drawn, or the file not written.
    """
    with contextlib.closing(make_env(env_id)) as env:
        if "rgb_array" not in env.metadata.get("render_modes", []):
            raise ConfigError(f"--video needs an environment that can be drawn, and {env_id} can't")
    env = make_env(env_id, render_mode="rgb_array")
    first_action = int(getattr(env.action_space, "start", 0))
    fps = ATARI_STEPS_PER_SECOND if is_atari(env_id) else float(env.metadata.get("render_fps", 30))
    writer = None
    try:
        obs, info = env.reset(seed=seed)
        while True:
            picture = draw(env)
            if writer is None:
                height, width = picture.shape[:2]
                writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"mp4v"), fps, (width, height))
                if not writer.isOpened():
                    raise ConfigError(f"--video must be a file that can be written, and {path} can't")
            writer.write(cv2.cvtColor(picture, cv2.COLOR_RGB2BGR))
            if "episode" in info:
                break
            action = int(policy(np.asarray(obs)[None])[0]) + first_action
            obs, _, terminated, truncated, info = env.step(action)
            if (terminated or truncated) and "episode" not in info:
                obs, info = env.reset()  # a life was lost; the game goes on
    finally:
        env.close()
        if writer is not None:
            writer.release()


def draw(env: gym.Env[Any, Any]) -> NDArray[np.uint8]:
    """Return a picture of the environment (H, W, 3).

    Raises:
        ConfigError: if it can't be drawn, say because a package for that is missing.
    """
    try:
        picture = env.render()
    except gym.error.Error as error:
        raise ConfigError(f"--video needs an environment that can be drawn: {error}") from error
    if not isinstance(picture, np.ndarray) or picture.ndim != 3:
        raise ConfigError("--video needs an environment that can be drawn: this one gives no picture")
    return picture


def main(argv: list[str] | None = None) -> None:
    """Parse the flags, play and print."""
    parser = Parser(prog="python -m minirl.evaluate", description="Play full games with what a run has learned.")
    parser.add_argument("run_dir", type=Path, metavar="RUN_DIR", help="directory of the run")
    parser.add_argument("--episodes", type=reader(int), default=100, metavar="N", help="games to play (default: 100)")
    parser.add_argument("--seed", type=reader(int), metavar="S", help="seed (default: that of the training + 10,000)")
    parser.add_argument("--stochastic", action="store_true", help="sample PPO's actions (default: the likeliest)")
    parser.add_argument("--video", type=Path, metavar="FILE", help="record a game to this .mp4 file")
    parser.add_argument("--last", action="store_true", help="play with the last network, not with DQN's best.pt")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--device", default="auto", metavar="NAME", help="auto, cpu or cuda (default: auto)")
    arguments = vars(parser.parse_args(argv))
    as_json = arguments.pop("json")
    try:
        result = evaluate(**arguments)
    except ConfigError as error:
        fail(error)
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    if as_json:
        print(json.dumps(result))
    else:
        how = "sampled" if arguments["stochastic"] else "greedy"
        print(
            f"return over {result['episodes']} games, {how} actions: "
            f"mean {result['mean_return']:.2f}, standard deviation {result['std_return']:.2f}, "
            f"minimum {result['min_return']:.2f}, maximum {result['max_return']:.2f}"
        )
