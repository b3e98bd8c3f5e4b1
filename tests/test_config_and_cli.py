"""Settings and flags: what is read, and that every mistake is one line and status 2 before anything is written."""

import dataclasses
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from minirl import ppo
from minirl.cli import make_parser, run_training
from minirl.config import ConfigError, check_settings, flag_name, setting
from minirl.dqn import DQNConfig
from minirl.ppo import PPOConfig
from minirl.q_learning import QLearningConfig
from minirl.runs import save_config

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
    arguments = vars(make_parser(Example, "").parse_args(argv))
    assert {name: arguments.pop(name) for name in ("device", "run_dir", "resume")} == {
        "device": "auto",
        "run_dir": None,
        "resume": None,
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


@pytest.mark.parametrize("settings", [{"count": 1}, {"count": 9}, {"rate": 1}, {"limit": 0}])
def test_a_config_takes_the_ends_of_its_ranges(settings: dict[str, Any]) -> None:
    Example(**settings)


@pytest.mark.parametrize("config_class", [PPOConfig, DQNConfig, QLearningConfig])
def test_every_field_is_a_flag_with_its_default_and_help(config_class: Any, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        make_parser(config_class, "").parse_args(["--help"])
    assert stop.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for field in dataclasses.fields(config_class):
        default = {"None": "none", "(24, 24)": "24,24"}.get(str(field.default), str(field.default))
        assert f"{field.metadata['help']} (default: {default})" in text
        assert flag_name(field.name) in text
        assert len(field.metadata["help"]) < 100


def test_the_defaults_are_the_source_notebooks() -> None:
    config = PPOConfig()
    assert dataclasses.asdict(config) == {
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
        # Switches of the field's that the notebook leaves as Stable-Baselines3 has them.
        "anneal_lr": False,
        "anneal_clip": False,
        "norm_adv": True,
        "value_clip_coef": None,
        "target_kl": None,
        # What changes no result.
        "compile": None,
        "precision": "auto",
        "num_workers": None,
        "checkpoint_frequency": 100_000,
        "video_frequency": None,
    }
    assert config.batch_size == 1024
    assert config.num_updates == 9766


MISTAKES = [
    ("--gamma 1.5", "--gamma must be a number from 0 to 1, not 1.5"),
    ("--gamma -0.1", "--gamma must be a number from 0 to 1, not -0.1"),
    ("--gamma nan", "--gamma must be a number from 0 to 1, not nan"),
    ("--gamma abc", "--gamma: must be a number, not 'abc'"),
    ("--gamma", "--gamma: expected one argument"),
    ("--gae-lambda 2", "--gae-lambda must be"),
    ("--learning-rate 0", "--learning-rate must be a number above 0, not 0.0"),
    ("--learning-rate inf", "--learning-rate must be a number above 0, not inf"),
    ("--learning-rate -0.001", "--learning-rate must be"),
    ("--clip-coef 0", "--clip-coef must be a number above 0"),
    ("--ent-coef -1", "--ent-coef must be a number of at least 0"),
    ("--vf-coef nan", "--vf-coef must be"),
    ("--max-grad-norm 0", "--max-grad-norm must be"),
    ("--target-kl 0", "--target-kl must be a number above 0 or none"),
    ("--value-clip-coef -1", "--value-clip-coef must be"),
    ("--num-envs 0", "--num-envs must be a whole number of at least 1, not 0"),
    ("--num-envs 2.5", "--num-envs: must be a whole number, not '2.5'"),
    ("--num-steps 0", "--num-steps must be"),
    ("--total-timesteps 0", "--total-timesteps must be"),
    ("--total-timesteps 1e6", "--total-timesteps: must be a whole number, not '1e6'"),
    ("--update-epochs 0", "--update-epochs must be"),
    ("--minibatch-size 0", "--minibatch-size must be"),
    ("--minibatch-size 100", "--minibatch-size must divide num_envs x num_steps = 1024, and 100 does not"),
    ("--num-envs 7", "--minibatch-size must divide num_envs x num_steps = 896, and 256 does not"),
    ("--minibatch-size 1", "--minibatch-size must be at least 2 to normalise advantages"),
    ("--num-workers 0", "--num-workers must be a whole number of at least 1 or none"),
    ("--checkpoint-frequency 0", "--checkpoint-frequency must be"),
    ("--seed -1", "--seed must be"),
    ("--seed 99999999999", "--seed must be a whole number from 0 to 2147483647"),
    ("--env-id NoSuchGame-v0", "--env-id must be an environment that Gymnasium can make"),
    ("--env-id ALE/Pang-v5", "--env-id must be an environment that Gymnasium can make"),
    ("--env-id Acrobot-v0", "--env-id must be an environment that Gymnasium can make"),
    ("--env-id HalfCheetah-v2", "--env-id must be an environment that Gymnasium can make"),
    ("--env-id .x:Y-v0", "--env-id must be an environment that Gymnasium can make"),
    ("--env-id CartPole-v99", "--env-id must be an environment that Gymnasium can make"),
    ("--env-id no_such_module:Env-v0", "--env-id must be an environment that Gymnasium can make"),
    ("--env-id Pendulum-v1", "--env-id must have Discrete actions for PPO"),
    ("--env-id FrozenLake-v1", "--env-id must have Box observations"),
    ("--env-id Blackjack-v1", "--env-id must have observations that are one array, not Tuple"),
    ("--env-id tests.fake_envs:Box2Actions-v0", "--env-id must have Discrete actions"),
    ("--env-id tests.fake_envs:DiscreteObservations-v0", "--env-id must have Box observations"),
    ("--env-id tests.fake_envs:SmallPicture-v0", "--env-id must have vectors (n,) or images"),
    ("--device tpu", "--device must be auto, cpu or cuda, not 'tpu'"),
    ("--device cuda", "--device cuda must have a GPU"),
    ("--nonsense 3", "unrecognized arguments: --nonsense 3"),
    ("--total 3", "unrecognized arguments: --total 3"),
    ("--run-dir taken", "--run-dir must be a new directory: taken holds a run; continue it with --resume taken"),
    ("--run-dir file", "--run-dir must be a directory, and file is a file"),
    ("--run-dir file/inside", "--run-dir must be a directory that can be written"),
    ("--resume nowhere", "nowhere must be a run directory, and has no config.json"),
    ("--resume taken", "there is no checkpoint here"),
    ("--resume broken", "can't be read"),
    ("--resume list", "must hold the settings of a run"),
    ("--resume odd", "must hold the settings of a run"),
    ("--resume foreign", "--resume must name a run of ppo: foreign is one of dqn"),
    ("--resume newer", "newer has settings that this version does not know: wings"),
    ("--resume garbled", "must be a checkpoint that minirl wrote, and can't be read"),
    ("--resume taken --run-dir other", "--run-dir can't go with --resume"),
    ("--resume taken --gamma 0.5", "--gamma 0.5 can't go with --resume: the run has 0.99; leave it out"),
]


@pytest.mark.parametrize(("line", "message"), MISTAKES, ids=[line for line, _ in MISTAKES])
def test_a_mistake_is_one_line_and_status_2_and_nothing_is_written(
    line: str,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    (tmp_path / "file").write_text("")
    for name in ("taken", "broken", "list", "foreign", "newer", "garbled"):
        (tmp_path / name).mkdir()
        save_config(tmp_path / name, "dqn" if name == "foreign" else "ppo", PPOConfig())
    (tmp_path / "broken" / "config.json").write_text("{")
    (tmp_path / "list" / "config.json").write_text("[]")
    newer = {"algorithm": "ppo", "env_id": "CartPole-v1", "seed": 1, "wings": 2}
    (tmp_path / "newer" / "config.json").write_text(json.dumps(newer))
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "config.json").write_text('{"algorithm": "ppo", "env_id": "CartPole-v1", "seed": "x"}')
    (tmp_path / "garbled" / "checkpoint.pt").write_bytes(b"PK\x03\x04 not a checkpoint")
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}

    with pytest.raises(SystemExit) as stop:
        run_training("ppo", PPOConfig, ppo.train, "", line.split())
    output = capsys.readouterr()
    assert stop.value.code == 2
    assert output.out == ""
    assert output.err.startswith("error: ")
    assert output.err.count("\n") == 1
    assert message in output.err
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


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


def test_ctrl_c_before_the_first_step_is_no_traceback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)

    def train(config: Any, *, run_dir: Path | None, resume: bool, device: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as stop:
        run_training("ppo", PPOConfig, train, "", [])
    assert stop.value.code == 130


@pytest.mark.parametrize("script", ["train_ppo.py", "train_dqn.py", "train_q.py"])
def test_each_script_shows_its_help(script: str) -> None:
    done = subprocess.run([sys.executable, str(ROOT / script), "--help"], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert "--total-timesteps" in done.stdout or "--num-episodes" in done.stdout


def test_the_script_trains_and_resumes(tmp_path: Path) -> None:
    """The real script in a process of its own: a default run directory, status 0, and 2 for a mistake."""

    def script(line: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(ROOT / "train_ppo.py"), *line.split()]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)

    done = script("--env-id ALE/Pong-v5 --num-envs 2 --num-steps 8 --minibatch-size 8 --total-timesteps 16 --seed 5")
    assert done.returncode == 0, done.stderr
    (run_dir,) = (tmp_path / "runs" / "ppo" / "ALE-Pong-v5").iterdir()
    assert run_dir.name.endswith("-seed5")
    assert {path.name.split(".")[0] for path in run_dir.iterdir()} == {"config", "checkpoint", "events"}

    resumed = script(f"--resume {run_dir} --total-timesteps 32")
    assert resumed.returncode == 0, resumed.stderr
    assert "32 of 32 steps" in resumed.stderr
    assert "\r" not in resumed.stderr
    assert "\x1b" not in resumed.stderr

    mistake = script("--gamma 7")
    assert (mistake.returncode, mistake.stdout) == (2, "")
    assert mistake.stderr == "error: --gamma must be a number from 0 to 1, not 7.0\n"
