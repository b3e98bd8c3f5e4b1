"""What does an edit in `edits/` gain? Trains with it and without, on the same seeds, and plays 100 games with each.

    python benchmarks/edits.py dueling-heads n-step-returns --seeds 3
    python benchmarks/edits.py lstm --flags "train_ppo.py --env-id Acrobot-v1 --num-steps 32 --total-timesteps 200000"

The training runs take turns, each in its own process in a copy of the repository; a baseline that several edits share
is trained once. Each run yields two numbers: the mean return of 100 greedy games of its last network, and that of the
last 100 episodes of training.
"""

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from minirl.checks import ConfigError
from minirl.runs.checkpoints import load_checkpoint
from minirl.runs.flags import Parser, fail, reader

ROOT = Path(__file__).parents[1]
SCRIPTS = ("train_ppo.py", "train_dqn.py")

PPO = "train_ppo.py @recipes/ppo-cartpole.args --gamma 0.98 --gae-lambda 0.8 --update-epochs 10"  # RL-Zoo's own
DQN = "train_dqn.py --eval-frequency none"
RECIPES = {  # the command of both sides, and the edit's own flags
    "adamw-rmsprop": (PPO, ""),
    "dueling-heads": (DQN, ""),
    "entropy-annealing": (f"{PPO} --ent-coef 0.02", "--anneal-ent"),
    "impala-cnn": ("train_ppo.py --total-timesteps 1000000", ""),
    "layernorm-gelu": (PPO, ""),
    "learning-rates": (PPO, ""),
    "lstm": (PPO, ""),
    "n-step-returns": (DQN, "--n-step 3"),
    "prioritized-replay": (DQN, ""),
    "rnd": ("train_ppo.py --env-id MountainCar-v0 --total-timesteps 500000", ""),
}


def run(copy: Path, *command: str) -> str:
    """Run a command in a copy and return its output; if it fails, say why, and exit with its status."""
    # git must see no repository above the copy: it would silently apply nothing.
    environment = {**os.environ, "PYTHONPATH": str(copy), "GIT_CEILING_DIRECTORIES": str(copy.parent)}
    result = subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True)
    if result.returncode != 0:
        print(*result.stderr.strip().splitlines()[-1:], file=sys.stderr)
        raise SystemExit(result.returncode)
    return result.stdout


def outcome(copy: Path, flags: list[str], seed: int) -> dict[str, float]:
    """Train with a seed; return the mean return of 100 greedy games, and of the last episodes of training."""
    algorithm = flags[0][len("train_") : -len(".py")]
    run_dir = copy / f"{algorithm}-{len(list(copy.iterdir()))}"
    run(copy, sys.executable, *flags, "--seed", str(seed), "--run-dir", run_dir.name, "--final-games", "0")
    last = ["--last"] if algorithm == "dqn" else []
    games = json.loads(run(copy, sys.executable, "-m", "minirl.evaluate", run_dir.name, "--json", *last))
    episodes = load_checkpoint(run_dir, algorithm)["returns"]
    return {"greedy": games["mean_return"], "training": statistics.fmean(episodes)}


def copy_of(parent: Path, edit: str | None) -> Path:
    """Copy the code needed for training, with an edit or none."""
    copy = parent / (edit or "without")
    for folder in ("minirl", "recipes"):
        shutil.copytree(ROOT / folder, copy / folder)
    for script in SCRIPTS:
        shutil.copy(ROOT / script, copy)
    if edit is not None:
        run(copy, "git", "apply", str(ROOT / "edits" / edit / f"{edit}.patch"))
    return copy


def main() -> None:
    """Train, and print and write a row for each seed as it finishes."""
    parser = Parser(scripts={}, description="Train with edits of edits/ and without, on the same seeds.")
    parser.add_argument("names", choices=RECIPES, nargs="+", metavar="NAME", help="of folders in edits/")
    parser.add_argument("--seeds", type=reader(int), default=3, metavar="N", help="how many, from 0 on (default: 3)")
    parser.add_argument("--flags", metavar="TEXT", help="script and flags of both sides, instead of the recipe")
    parser.add_argument("--output", type=Path, metavar="DIR", help="of NAME.json (default: runs/edits)")
    given = parser.parse_args()
    output: Path = (given.output or ROOT / "runs" / "edits").absolute()
    known: dict[tuple[str, int], dict[str, float]] = {}  # flags and seed -> the result without an edit
    try:
        if given.seeds < 1:
            raise ConfigError(f"--seeds must be at least 1, not {given.seeds}")
        if given.flags is not None and given.flags.split(" ")[0] not in SCRIPTS:
            raise ConfigError(f"--flags must start with {' or '.join(SCRIPTS)}")
        output.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory() as parent:
            plain = copy_of(Path(parent), None)
            for name in given.names:
                edited, rows = copy_of(Path(parent), name), list[dict[str, Any]]()
                recipe, own = RECIPES[name]
                common = given.flags or recipe
                flags = {"without": common, "with": f"{common} {own}".strip()}
                print(f"\n{name}\n\n| seed | greedy without | with | training without | with |")
                print("| --- | --- | --- | --- | --- |")
                for seed in range(given.seeds):
                    if (common, seed) not in known:
                        known[common, seed] = outcome(plain, common.split(), seed)
                    row = {"without": known[common, seed], "with": outcome(edited, flags["with"].split(), seed)}
                    means = [f"{row[side][kind]:.1f}" for kind in ("greedy", "training") for side in row]
                    print(f"| {seed} | {' | '.join(means)} |", flush=True)
                    rows.append({"seed": seed, **row})
                    content = json.dumps({"edit": name, "flags": flags, "seeds": rows}, indent=2) + "\n"
                    (output / f"{name}.json").write_text(content)
    except (ConfigError, OSError, ValueError) as error:
        fail(error)


if __name__ == "__main__":
    main()
