"""Play full games, with unclipped rewards, with what a run has learned: `python -m minirl.evaluate RUN_DIR`.

On Atari the games have the preprocessing of the training (for example, FIRE is pressed after a lost life), while the
returns are the real scores of whole games. A run of rlhf writes texts (`of_texts`).
"""

import contextlib
import functools
import json
import math
import statistics
from pathlib import Path
from typing import Any

import gymnasium as gym
import torch

from minirl import q_learning
from minirl.checks import ConfigError
from minirl.dqn import DQNConfig, greedy_actions, make_q_network
from minirl.envs.make import env_options, make_vector_env
from minirl.envs.vector import VectorEnv
from minirl.evaluate.of_texts import evaluate_texts, in_lines
from minirl.fast.machine import select_device
from minirl.ppo import ActorCritic, PPOConfig, choose_actions, make_agent
from minirl.q_learning import QLearningConfig, load_table
from minirl.results.play import SIDE_BY_SIDE, Policy, play_games
from minirl.results.video import LONGEST_VIDEO, record_game, steps_per_second
from minirl.results.window import at_game_speed, open_window
from minirl.rlhf import RLHFConfig
from minirl.runs.checkpoints import BEST_FILE, CHECKPOINT_FILE, load_checkpoint, load_weights
from minirl.runs.directory import load_settings
from minirl.runs.flags import Parser, errors_in_one_line, read_path, reader, saved_config
from minirl.runs.progress import Progress, answer, say
from minirl.runs.run import seed_everything
from minirl.runs.settings import MAX_WHOLE
from minirl.streams import MAX_SEED

TRAINING_SCRIPTS = {
    "train_ppo.py": PPOConfig,
    "train_dqn.py": DQNConfig,
    "train_q.py": QLearningConfig,
    "train_rlhf.py": RLHFConfig,
}


def evaluate(
    run_dir: str | Path,
    *,
    episodes: int = 100,
    seed: int | None = None,
    stochastic: bool = False,
    video: str | Path | None = None,
    render: bool = False,
    last: bool = False,
    device: str = "auto",
    patience: float = math.inf,
) -> dict[str, Any]:
    """Play `episodes` games and return what `--json` prints.

    If the training has picked a best network (`best.pt`, from DQN), that one plays; otherwise the last one.

    Args:
        run_dir: the directory of a run.
        episodes: games to play.
        seed: of the games and of sampled actions; None for the seed of the training plus 10,000.
        stochastic: sample actions from PPO's policy; otherwise always take the most likely one.
        video: record a game, in colour, to this `.mp4` or `.gif`, at most `LONGEST_VIDEO` agent steps of it. If actions
            are greedy, it is the first game of the first environment.
        render: play the games in a window, one after the other, at the speed of the game.
        last: play with the last network even if there is a best one (DQN).
        device: `auto`, `cpu` or `cuda`.
        patience: seconds after which the games are given up, with a TimeoutError.

    Returns:
        `mean_return`, `std_return` (of these games: divided by n), `min_return`, `max_return`, `episodes`, `returns`;
        for a run of rlhf, what `evaluate_texts` returns.

    Raises:
        ConfigError: if the run or an argument can't be used.
        EnvError: if the environment fails.
    """
    if not 1 <= episodes <= MAX_WHOLE:
        raise ConfigError(f"--episodes must be a whole number from 1 to {MAX_WHOLE}, not {episodes}")
    if seed is not None and not 0 <= seed <= MAX_SEED:
        raise ConfigError(f"--seed must be a whole number from 0 to {MAX_SEED}, not {seed}")
    video = None if video is None else Path(video).absolute()
    if video is not None and (video.suffix not in (".mp4", ".gif") or not video.parent.is_dir()):
        raise ConfigError(f"--video must be a file that ends in .mp4 or .gif, in a directory that exists, not {video}")
    run_dir = Path(run_dir).absolute()
    settings = load_settings(run_dir)
    torch_device = select_device(device)
    if seed is None:
        seed = (int(settings["seed"]) + 10_000) % (MAX_SEED + 1)  # far from the training's: other games
    if settings["algorithm"] == "rlhf":
        given = {"--stochastic": stochastic, "--video": video, "--render": render, "--last": last}
        if wrong := [flag for flag, value in given.items() if value]:
            raise ConfigError(f"{wrong[0]} must go with a run that plays games: one of rlhf writes texts")
        return evaluate_texts(run_dir, settings, episodes, seed, device)
    env_id = settings["env_id"]
    shown = env_options(settings)
    seed_everything(seed)  # environments may draw while they are made, too
    with make_envs(env_id, episodes, render, shown) as envs:
        policy = load_policy(run_dir, settings, envs, torch_device, stochastic=stochastic, last=last)
        if video is not None:
            seed_everything(seed)
            if not record_game(policy, env_id, seed, video, **shown):
                say(f"video: the first {LONGEST_VIDEO:,} agent steps of a longer game")
        if render:
            policy = at_game_speed(policy, steps_per_second(env_id))
        seed_everything(seed)
        with contextlib.closing(Progress(episodes, unit="games")) as progress:
            returns = play_games(policy, envs, episodes, seed, progress, patience)
    return {
        "mean_return": statistics.fmean(returns),
        "std_return": statistics.pstdev(returns),
        "min_return": min(returns),
        "max_return": max(returns),
        "episodes": episodes,
        "returns": returns,
    }


def in_one_line(result: dict[str, Any], how: str = "greedy") -> str:
    """Format what `evaluate` returned of games; `how` says which actions were taken."""
    return (
        f"return over {result['episodes']} games, {how} actions: "
        f"mean {result['mean_return']:.2f}, standard deviation {result['std_return']:.2f}, "
        f"minimum {result['min_return']:.2f}, maximum {result['max_return']:.2f}"
    )


def make_envs(env_id: str, episodes: int, render: bool, shown: dict[str, Any]) -> VectorEnv:
    """Make the environments for `episodes` games: side by side, or one in a window."""
    if not render:
        return make_vector_env(env_id, min(episodes, SIDE_BY_SIDE), **shown)
    window = open_window(env_id, **shown)
    return VectorEnv(lambda: window, 1, num_workers=1)


def load_policy(
    run_dir: Path,
    settings: dict[str, Any],
    envs: VectorEnv,
    device: torch.device,
    *,
    stochastic: bool = False,
    last: bool = False,
) -> Policy:
    """Return the saved network or table as a function from observations to actions.

    Raises:
        ConfigError: if there is none, or the algorithm has no distribution to sample from, or no best network besides
            the last one.
    """
    algorithm = settings["algorithm"]
    if stochastic and algorithm != "ppo":
        raise ConfigError(f"--stochastic must go with a run of ppo: {algorithm} has no probabilities to sample from")
    if last and algorithm != "dqn":
        raise ConfigError(f"--last must go with a run of dqn: one of {algorithm} keeps its last network only")
    if algorithm == "ppo":
        agent = ppo_agent(run_dir, envs.observation_space, envs.action_space, device)
        return functools.partial(choose_actions, agent, sample=stochastic)
    if algorithm == "dqn":
        return dqn_policy(run_dir, settings, envs, last, device)
    if algorithm == "q_learning":
        table = load_table(load_checkpoint(run_dir, "q_learning", "q_table"), envs)
        return functools.partial(q_learning.greedy_actions, table)
    raise ConfigError(f"{run_dir} must hold a run of ppo, dqn, q_learning or rlhf, not of {algorithm}")


def ppo_agent(
    run_dir: Path, observation_space: gym.Space[Any], action_space: gym.Space[Any], device: torch.device
) -> ActorCritic:
    """Return PPO's network with the weights that a run has saved."""
    saved = load_checkpoint(run_dir, "ppo", "model")
    config = saved_config(PPOConfig, run_dir, load_settings(run_dir))
    agent = make_agent(config, observation_space, action_space).to(device)
    load_weights(agent, saved)
    return agent.eval()


def dqn_policy(run_dir: Path, settings: dict[str, Any], envs: VectorEnv, last: bool, device: torch.device) -> Policy:
    """Return DQN's network, the best if there is one, as a policy: the first of its best actions."""
    file = CHECKPOINT_FILE if last or not (run_dir / BEST_FILE).exists() else BEST_FILE
    saved = load_checkpoint(run_dir, "dqn", "model", file=file)
    config = saved_config(DQNConfig, run_dir, settings)
    network = make_q_network(config, envs.observation_space, envs.action_space).to(device)
    load_weights(network, saved)
    say(f"network: {file}, of agent step {saved['global_step']:,}")
    return functools.partial(greedy_actions, network.eval(), device)


@errors_in_one_line()
def main(argv: list[str] | None = None) -> None:
    """Parse the flags, play and print."""
    parser = Parser(
        scripts=TRAINING_SCRIPTS,
        prog="python -m minirl.evaluate",
        description="Play full games with what a run has learned.",
    )
    parser.add_argument("run_dir", type=read_path, metavar="RUN_DIR", help="directory of the run")
    parser.add_argument("--episodes", type=reader(int), default=100, metavar="N", help="games to play (default: 100)")
    parser.add_argument("--seed", type=reader(int), metavar="S", help="seed (default: that of the training + 10,000)")
    parser.add_argument("--stochastic", action="store_true", help="sample PPO's actions (default: the likeliest)")
    parser.add_argument("--video", type=read_path, metavar="FILE", help="record a game to this .mp4 or .gif file")
    parser.add_argument("--render", action="store_true", help="play the games in a window, one after the other")
    parser.add_argument("--last", action="store_true", help="play with DQN's last network, not with best.pt")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--device", default="auto", metavar="NAME", help="auto, cpu or cuda (default: auto)")
    arguments = vars(parser.parse_args(argv))
    as_json = arguments.pop("json")
    result = evaluate(**arguments)
    if as_json:
        answer(json.dumps(result))
    elif "samples" in result:
        answer(in_lines(result))
    else:
        answer(in_one_line(result, "sampled" if arguments["stochastic"] else "greedy"))
