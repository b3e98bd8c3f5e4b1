"""Settings and flags: what is read, what help shows and hints say. Mistakes are in test_mistakes.py."""

import argparse
import dataclasses
import importlib
import os
import re
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

import gymnasium as gym
import pytest
import torch

from minirl import dqn, ppo
from minirl.checks import ConfigError
from minirl.dqn import DQNConfig
from minirl.ppo import PPOConfig
from minirl.q_learning import QLearningConfig
from minirl.rlhf import RLHFConfig
from minirl.runs.checkpoints import load_checkpoint
from minirl.runs.directory import save_config
from minirl.runs.flags import make_parser
from minirl.runs.run import BROKEN_PIPE, Run, Stopped
from minirl.runs.settings import RECIPES, check_settings, flag_name, new_schedules, setting
from minirl.scripts.train import run_training
from tests.recipes import parsed

ROOT = Path(__file__).parent.parent


@dataclass(frozen=True)
class Example:
    count: int = setting(3, "how many", at_least=1, at_most=9)
    rate: float = setting(0.5, "how fast", above=0)
    limit: float | None = setting(None, "how far", at_least=0)
    loud: bool = setting(True, "whether")
    name: str = setting("a", "who")

    def __post_init__(self) -> None:
        check_settings(self)


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        ([], {}),
        (["--count", "9", "--rate", "1e-3"], {"count": 9, "rate": 0.001}),
        (["--limit", "2"], {"limit": 2.0}),
        (["--limit", "None"], {"limit": None}),
        (["--no-loud", "--name", "b c"], {"loud": False, "name": "b c"}),
        (["--loud"], {"loud": True}),
    ],
)
def test_flags_are_read_and_absent_ones_stay_absent(argv: list[str], expected: dict[str, Any]) -> None:
    arguments = vars(make_parser(Example, "", {}).parse_args(argv))
    assert {name: arguments.pop(name) for name in ("device", "run_dir", "resume", "seeds")} == {
        "device": "auto",
        "run_dir": None,
        "resume": None,
        "seeds": None,
    }
    assert arguments == expected
    assert all(type(arguments[name]) is type(value) for name, value in expected.items())
    assert Example(**arguments) == dataclasses.replace(Example(), **expected)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"count": 0}, "--count must be a whole number from 1 to 9, not 0"),
        ({"count": 10}, "--count must be a whole number from 1 to 9, not 10"),
        ({"count": 1.5}, "--count must be a whole number from 1 to 9, not 1.5"),
        ({"count": True}, "--count must be a whole number from 1 to 9, not True"),
        ({"count": None}, "--count must be a whole number from 1 to 9, not None"),
        ({"rate": 0.0}, "--rate must be a number above 0, not 0.0"),
        ({"rate": float("nan")}, "--rate must be a number above 0, not nan"),
        ({"rate": float("inf")}, "--rate must be a number above 0, not inf"),
        ({"rate": "fast"}, "--rate must be a number above 0, not 'fast'"),
        ({"limit": -1}, "--limit must be a number of at least 0 or none, not -1"),
        ({"loud": 1}, "--loud must be true or false, not 1"),
        ({"name": 5}, "--name must be text, not 5"),
    ],
)
def test_a_config_refuses_what_it_cannot_use(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        Example(**settings)
    assert str(error.value) == message


@pytest.mark.parametrize(
    ("name", "kind", "default", "message"),
    [
        ("own", dict[str, int], setting(None, "x"), r"Own.own must be of type int, .* and None, not dict\[str, int\]"),
        ("own", tuple[float, ...], setting((0.1,), "x"), r"Own.own must be of type int, .*, not tuple\[float, ...\]"),
        ("own", float | int, setting(0.1, "x"), r"Own.own must be of type int, .*, not float \| int"),
        ("own", float, 0.1, r'Own.own must be declared as setting\(0.1, "what it is"\)'),
    ],
)
def test_a_field_that_can_be_no_flag_is_named(name: str, kind: Any, default: Any, message: str) -> None:
    own = dataclasses.make_dataclass("Own", [(name, kind, default)])
    with pytest.raises(TypeError, match=message):
        make_parser(own, "", {})


def test_a_field_with_the_name_of_another_flag_is_named() -> None:
    own = dataclasses.make_dataclass("Own", [("device", str, setting("x", "x"))])
    with pytest.raises(argparse.ArgumentError, match="argument --device: conflicting option string: --device"):
        make_parser(own, "", {})


def test_optional_is_another_word_for_or_none() -> None:
    own = dataclasses.make_dataclass("Own", [("own", Optional[float], setting(0.1, "x", at_least=0))])  # noqa: UP045
    assert vars(make_parser(own, "", {}).parse_args(["--own", "none"]))["own"] is None


@pytest.mark.parametrize("settings", [{"count": 1}, {"count": 9}, {"rate": 1}, {"limit": 0}])
def test_a_config_takes_the_ends_of_its_ranges(settings: dict[str, Any]) -> None:
    Example(**settings)


@pytest.mark.parametrize("config_class", [PPOConfig, DQNConfig, QLearningConfig, RLHFConfig])
def test_every_field_is_a_flag_with_its_default_and_help(config_class: Any, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        make_parser(config_class, "", {}).parse_args(["--help"])
    assert stop.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for field in dataclasses.fields(config_class):
        words = {
            "None": "none",
            "(24, 24)": "24,24",
            "(64, 64)": "64,64",
            "(32, 64, 64)": "32,64,64",
            "True": "on",
            "False": "off",
        }
        default = words.get(str(field.default), str(field.default))
        assert f"{field.metadata['help']} (default: {default})" in text
        assert flag_name(field.name) in text
        assert len(field.metadata["help"]) < 100


SCRIPTS = {"train_ppo": PPOConfig, "train_dqn": DQNConfig, "train_q": QLearningConfig, "train_rlhf": RLHFConfig}
COMMANDS = [*SCRIPTS, "minirl.evaluate", "minirl.plots"]


def run_here(command: str, line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", [command, *line.split()])
    importlib.import_module(command).main()


@pytest.mark.parametrize("command", COMMANDS)
def test_help_is_grouped_and_fits_on_two_screens(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for columns, most_lines in [(100, 100), (80, 120)]:
        monkeypatch.setenv("COLUMNS", str(columns))
        with pytest.raises(SystemExit) as stop:
            run_here(command, "--help", monkeypatch)
        assert stop.value.code == 0
        lines = capsys.readouterr().out.splitlines()
        assert len(lines) <= most_lines
        assert all(len(line) <= columns for line in lines)
    if command in SCRIPTS:
        groups: dict[str, list[str]] = {}
        for line in lines:
            if line and line[0] != " ":
                flags = groups.setdefault(line, [])
            elif line.startswith("  -"):
                flags.append(line.split()[0].strip(","))
        assert all(1 <= len(flags) <= 7 for title, flags in groups.items() if title.endswith(":"))
        assert groups["task:"][:2] == ["--stage" if command == "train_rlhf" else "--env-id", "--seed"]
        assert groups["run:"][0] == "--run-dir"


HINTS = [
    ("train_ppo", "--gae_lambda 0.9", "unrecognized arguments: --gae_lambda 0.9; did you mean --gae-lambda?"),
    ("train_ppo", "--gae_lambda=0.9", "unrecognized arguments: --gae_lambda=0.9; did you mean --gae-lambda?"),
    ("train_ppo", "--gea-lambda 0.9", "unrecognized arguments: --gea-lambda 0.9; did you mean --gae-lambda?"),
    ("train_ppo", "-gamma 1", "unrecognized arguments: -gamma 1; did you mean --gamma?"),
    ("train_ppo", "--total 100", "unrecognized arguments: --total 100; did you mean --total-timesteps?"),
    ("train_ppo", "--no-aneal-lr", "unrecognized arguments: --no-aneal-lr; did you mean --no-anneal-lr?"),
    ("train_ppo", "--tau 1", "unrecognized arguments: --tau 1; --tau belongs to train_dqn.py"),
    ("train_dqn", "--clip-coef 1", "unrecognized arguments: --clip-coef 1; --clip-coef belongs to train_ppo.py"),
    ("train_dqn", "--wings 2", "unrecognized arguments: --wings 2; --help shows all flags"),
    (
        "train_dqn",
        "--huber yes",
        "unrecognized arguments: yes; names of flags start with --, and switches take no value",
    ),
    ("train_q", "--learning-rate 1", "--learning-rate belongs to train_ppo.py and train_dqn.py"),
    ("train_q", "--", "unrecognized arguments: --; names of flags start with --"),
    ("minirl.evaluate", "run --episode 3", "unrecognized arguments: --episode 3; did you mean --episodes?"),
    ("minirl.plots", "run --ouptut a.png", "unrecognized arguments: --ouptut a.png; did you mean --output?"),
]


@pytest.mark.parametrize(("command", "line", "message"), HINTS, ids=[f"{case[0]} {case[1]}" for case in HINTS])
def test_a_wrong_flag_gets_a_hint(
    command: str, line: str, message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        run_here(command, line, monkeypatch)
    error = capsys.readouterr().err
    assert stop.value.code == 2
    assert error.startswith("error: ")
    assert message in error
    assert error.count("\n") == 1


def test_a_negative_number_may_have_an_exponent() -> None:
    arguments = make_parser(QLearningConfig, "", {}).parse_args(["--initial-value", "-1e-3"])
    assert arguments.initial_value == -0.001


def test_the_defaults_are_the_source_notebooks() -> None:
    config = PPOConfig()
    defaults = {
        "env_id": "PongNoFrameskip-v4",
        "num_envs": 8,
        "num_steps": 128,
        "total_timesteps": 10_000_000,
        "minibatch_size": 256,
        "update_epochs": 4,
        "learning_rate": 2.5e-4,
        "gamma": 0.99,
        "gae_lambda": 0.9,
        "clip_coef": 0.1,
        "ent_coef": 0.01,
        "vf_coef": 0.5,
        "max_grad_norm": 0.5,
        "seed": 42,
        # What the notebook leaves as Stable-Baselines3 has it.
        "frame_size": 84,
        "hidden_sizes": (64, 64),
        "activation": "tanh",
        "cnn_channels": (32, 64, 64),
        "log_std_init": 0.0,
        "anneal_lr": False,
        "anneal_clip": False,
        "norm_adv": True,
        "norm_obs": False,
        "norm_reward": False,
        "value_clip_coef": None,
        "target_kl": None,
        # What changes no result.
        "compile": None,
        "precision": "auto",
        "num_workers": None,
        "num_threads": None,
        "checkpoint_frequency": 100_000,
        "video_frequency": None,
    }
    # A new setting, of an edit say, is not among them.
    assert {name: value for name, value in dataclasses.asdict(config).items() if name in defaults} == defaults
    assert config.batch_size == 1024
    assert config.num_updates == 9766


def test_a_flag_that_repeats_the_runs_own_setting_may_go_with_resume(tmp_path: Path) -> None:
    seen: dict[str, Any] = {}

    def train(config: Any, *, run_dir: Path | None, resume: bool, device: str) -> None:
        seen.update(config=config, run_dir=run_dir, resume=resume, device=device)

    save_config(tmp_path, "ppo", PPOConfig(gamma=0.5))
    argv = ["--resume", str(tmp_path), "--gamma", "0.5", "--total-timesteps", "7", "--device", "cpu"]
    argv += ["--num-workers", "3", "--checkpoint-frequency", "9"]
    run_training("ppo", PPOConfig, train, "", argv)
    assert seen == {
        "config": PPOConfig(gamma=0.5, total_timesteps=7, num_workers=3, checkpoint_frequency=9),
        "run_dir": tmp_path,
        "resume": True,
        "device": "cpu",
    }


@pytest.mark.parametrize(
    ("now", "done", "note"),
    [
        ({"anneal_lr": True}, 1.0, None),
        ({"total_timesteps": 200}, 0.5, None),
        (
            {"total_timesteps": 200, "anneal_lr": True, "anneal_clip": True},
            0.4,
            "total_timesteps is 200 now, and schedules follow it; "
            "anneal_lr, anneal_clip: from 60% of the start value here to 0 at the new end",
        ),
    ],
)
def test_a_longer_run_says_what_its_schedules_do(now: dict[str, Any], done: float, note: str | None) -> None:
    before = PPOConfig(total_timesteps=100)
    assert new_schedules(dataclasses.asdict(before), dataclasses.replace(before, **now), done) == note


@pytest.mark.parametrize(
    ("algorithm", "config", "where"),
    [
        ("ppo", PPOConfig(), None),
        ("ppo", PPOConfig("BreakoutNoFrameskip-v4"), None),
        ("ppo", PPOConfig("CartPole-v1", num_steps=32), None),
        (
            "ppo",
            PPOConfig("CartPole-v1", seed=7, total_timesteps=300_000, compile=False),
            "better ones: @recipes/ppo-cartpole.args",
        ),
        ("ppo", PPOConfig("Ant-v5"), "recipes/ has better ones for some tasks"),
        ("dqn", DQNConfig(total_timesteps=9_000), None),
        ("dqn", DQNConfig("PongNoFrameskip-v4", eval_frequency=None), "better ones: @recipes/dqn-pong.args"),
        ("q_learning", QLearningConfig("Taxi-v4", num_episodes=9), "better ones: @recipes/q-taxi.args"),
    ],
)
def test_who_chooses_a_task_and_no_setting_is_told_where_settings_are(
    algorithm: str, config: Any, where: str | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with Run(algorithm, config, tmp_path / "run", total=1) as run:
        run.checkpoint(0, dict)
    lines = capsys.readouterr().err.splitlines()[1:]
    default = type(config)().env_id
    note = f"all settings are the defaults, which are for {default}; {where}"
    assert lines == ([] if where is None else [note])
    resumed = load_checkpoint(tmp_path / "run", algorithm)
    with Run(algorithm, config, tmp_path / "run", total=1, resumed=resumed):
        assert capsys.readouterr().err.splitlines()[1:] == [], "once"


# Recipes


@pytest.mark.parametrize("recipe", sorted(RECIPES.glob("*.args")), ids=lambda recipe: recipe.stem)
def test_a_recipe_is_of_flags_and_says_what_it_came_to(recipe: Path) -> None:
    script = f"train_{recipe.stem.split('-')[0]}.py"
    config, given = parsed(script, f"@{recipe}")
    lines = recipe.read_text().splitlines()
    assert f"--env-id {config.env_id}" in lines
    assert lines[0].startswith("# ")
    flags = " ".join(line for line in lines if line[0] != "#").split(" --")
    assert len(flags) == len(given), "each flag is a setting, and given once"
    assert parsed(script, f"@{recipe}", "--seed", "7")[0] == dataclasses.replace(config, seed=7)


def test_what_stands_later_than_a_recipe_wins(tmp_path: Path) -> None:
    (tmp_path / "a.args").write_text("# two flags\n\n--gamma 0.5 --num-envs=2  # and why\n")
    recipe = f"@{tmp_path / 'a.args'}"
    assert parsed("train_ppo.py", recipe, "--gamma", "0.7")[0] == PPOConfig(gamma=0.7, num_envs=2)
    assert parsed("train_ppo.py", "--gamma", "0.7", recipe)[0] == PPOConfig(gamma=0.5, num_envs=2)


@pytest.mark.parametrize(
    ("content", "later", "message"),
    [
        (None, [], "No such file or directory: 'a.args'"),
        ("--seed 1\n--gama 0.9", [], "unrecognized arguments: --gama 0.9; did you mean --gamma? (a.args, line 2)"),
        ("# x\n--gamma nine", [], "--gamma: must be a number, not 'nine' (a.args, line 2)"),
        ("--seed 1\n\n--gamma=9", [], "--gamma must be a number from 0 to 1, not 9.0 (a.args, line 3)"),
        (
            "0.9",
            [],
            "unrecognized arguments: 0.9; names of flags start with --, and switches take no value (a.args, line 1)",
        ),
        ("--gamma 0.9", ["--gamma", "9"], "--gamma must be a number from 0 to 1, not 9.0"),
        ("--seed 1\n--env-id 'Pong", [], '"--env-id \'Pong" must be flags: No closing quotation (a.args, line 2)'),
        ("--gamma 0.5\n--gamma 9", [], "--gamma must be a number from 0 to 1, not 9.0 (a.args, line 2)"),
        ("--gamma x\n--gamma 0.5", [], "--gamma: must be a number, not 'x' (a.args, line 1)"),
        ("--gamma 0.5\n@nested", [], "--gamma must be a number from 0 to 1, not 7.0 (nested, line 2)"),
        ("--gamma 0.5\n@other", [], "No such file or directory: 'other' (a.args, line 2)"),
        ("--gamma 0.5\n@a.args", [], "@a.args must be flags, and names itself (a.args, line 2)"),
        ("# caf\xe9\n--gamma 0.5", [], "'utf-8' codec can't decode byte 0xe9 in position 5: invalid continuation byte"),
        ("\xef\xbb\xbf--gamma 9", [], "--gamma must be a number from 0 to 1, not 9.0 (a.args, line 1)"),
    ],
)
def test_a_fault_in_a_recipe_is_named_with_its_line(
    content: str | None,
    later: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    if content is not None:
        Path("a.args").write_text(content, encoding="latin-1")
    Path("nested").write_text("--seed 1\n--gamma 7")
    with pytest.raises(SystemExit) as stop:
        run_training("ppo", PPOConfig, ppo.train, "", ["@a.args", *later])
    assert stop.value.code == 2
    assert capsys.readouterr().err.endswith(f"{message}\n")


def test_a_recipe_that_is_not_there_is_one_that_is_near(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "ppo-pendulum.args").touch()
    for name, hint in (("ppo-pendulm.args", f"; did you mean @{tmp_path / 'ppo-pendulum.args'}?"), ("other.args", "")):
        with pytest.raises(SystemExit):
            parsed("train_ppo.py", f"@{tmp_path / name}")
        assert capsys.readouterr().err.endswith(f"No such file or directory: '{tmp_path / name}'{hint}\n")


def test_a_longer_run_of_double_dqn_says_what_epsilon_does(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = DQNConfig(total_timesteps=100, learning_starts=60, batch_size=8, eval_frequency=None)
    dqn.train(config, run_dir=tmp_path / "run", device="cpu")
    assert "schedules" not in capsys.readouterr().err
    longer = dataclasses.replace(config, total_timesteps=400)
    dqn.train(longer, run_dir=tmp_path / "run", resume=True, device="cpu")
    assert capsys.readouterr().err.splitlines()[1] == (
        "total_timesteps is 400 now, and schedules follow it; anneal_lr: from 75% of the start value here to 0 at the "
        "new end; epsilon: falls until 10% of the new total"
    )
    dqn.train(longer, run_dir=tmp_path / "run", resume=True, device="cpu")
    assert "schedules" not in capsys.readouterr().err


def test_gymnasiums_warnings_have_no_colours() -> None:
    with pytest.warns(UserWarning, match="^WARN: the observation is 7 off$"):
        gym.logger.warn("the observation is %d off", 7)


@pytest.mark.parametrize(
    ("stopped", "status"),
    [
        (KeyboardInterrupt(), 130),  # before the first step, too, when it is Python's own
        (Stopped(signal.SIGTERM), 143),
        (Stopped(signal.SIGHUP), 129),
        (Stopped(BROKEN_PIPE), 141),
    ],
)
def test_a_stopped_training_ends_the_script_with_a_status_and_no_report(
    stopped: KeyboardInterrupt, status: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def train(config: Any, *, run_dir: Path | None, resume: bool, device: str) -> None:
        raise stopped

    reported: list[Any] = []
    monkeypatch.setattr("minirl.scripts.train.report", lambda *arguments: reported.append(arguments))
    with pytest.raises(SystemExit) as stop:
        run_training("ppo", PPOConfig, train, "", ["--run-dir", str(tmp_path / "run")])
    assert (stop.value.code, reported) == (status, [])


@pytest.mark.slow
def test_the_script_trains_and_resumes(tmp_path: Path) -> None:
    """The real script in a process of its own: a default run directory, status 0, and 2 for a mistake."""

    def script(line: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(ROOT / "train_ppo.py"), *line.split()]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)

    settings = "--env-id ALE/Pong-v5 --num-envs 2 --num-steps 8 --minibatch-size 8 --final-games 0"
    done = script(f"{settings} --total-timesteps 16 --seed 5")
    assert done.returncode == 0, done.stderr
    (run_dir,) = (tmp_path / "runs" / "ppo" / "ALE-Pong-v5").iterdir()
    assert run_dir.name.endswith("-seed5")
    assert {path.name.split(".")[0] for path in run_dir.iterdir()} == {"config", "checkpoint", "events"}

    resumed = script(f"--resume {run_dir} --total-timesteps 32 --final-games 0")
    assert resumed.returncode == 0, resumed.stderr
    assert "32 of 32 steps" in resumed.stderr

    played = subprocess.run(
        [sys.executable, "-m", "minirl.evaluate", run_dir, "--episodes", "1"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert "1 of 1 games" in played.stderr
    for text in (done.stderr, resumed.stderr, played.stderr, played.stdout):
        assert re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]", text) is None, "no control characters but line ends"

    mistake = script("--gamma 7")
    assert (mistake.returncode, mistake.stdout) == (2, "")
    assert mistake.stderr == "error: --gamma must be a number from 0 to 1, not 7.0\n"


@pytest.mark.parametrize(
    "error",
    [
        MemoryError("no room"),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB."),
    ],
)
def test_settings_that_do_not_fit_into_memory_are_a_mistake_on_a_gpu_too(
    error: Exception, capsys: pytest.CaptureFixture[str]
) -> None:
    def train(config: Any, **options: Any) -> None:
        raise error

    with pytest.raises(SystemExit) as stop:
        run_training("ppo", PPOConfig, train, "", ["--num-envs", "8"])
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(
        "error: the settings must fit into this machine's memory, --num-envs, --num-steps, --hidden-sizes, "
        "--cnn-channels, --frame-size say: "
    )
    assert str(error) in line


def test_a_full_device_is_told_in_one_line(device: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    flags = "--env-id CartPole-v1 --num-envs 1 --num-steps 1000000000000 --minibatch-size 1000000000000"
    with pytest.raises(SystemExit) as stop:
        run_training(
            "ppo", PPOConfig, ppo.train, "", [*flags.split(), "--device", device, "--run-dir", str(tmp_path / "run")]
        )
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(
        "error: the settings must fit into this machine's memory, --num-envs, --num-steps, --hidden-sizes, "
        "--cnn-channels, --frame-size say: "
    )
    assert not (tmp_path / "run").exists()


def test_other_errors_are_not_hidden() -> None:
    def train(config: Any, **options: Any) -> None:
        raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug"):
        run_training("ppo", PPOConfig, train, "", [])
