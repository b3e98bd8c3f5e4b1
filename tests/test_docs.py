"""The documents: links lead somewhere, quoted code is where they say, commands and snippets work as written."""

import argparse
import dataclasses
import inspect
import io
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any, NoReturn

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import minirl.evaluate
import minirl.ppo
from minirl import dqn, ppo, q_learning, rlhf
from minirl.dqn import DQNConfig
from minirl.ppo import PPOConfig
from minirl.q_learning import QLearningConfig
from minirl.rlhf import RLHFConfig
from tests.links import CODE_LINK, DOCUMENTS, ROOT, relink

README = (ROOT / "README.md").read_text()
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
CONFIGS = {
    "train_ppo.py": PPOConfig,
    "train_dqn.py": DQNConfig,
    "train_q.py": QLearningConfig,
    "train_rlhf.py": RLHFConfig,
}
BY_NAME = {document.name: document for document in DOCUMENTS}

every_document = pytest.mark.parametrize("name", BY_NAME)


def blocks(text: str, language: str) -> list[str]:
    return [match[2] for match in FENCE.finditer(text) if match[1] == language]


def prose(text: str) -> str:
    """The text outside code blocks and formulas."""
    return re.sub(r"\$[^$\n]+\$", "", FENCE.sub("", text))


def section(text: str, heading: str) -> str:
    return text.split(f"\n## {heading}\n")[1].split("\n## ")[0]


# Links and names


@every_document
def test_quoted_code_stands_where_the_link_says(name: str) -> None:
    document = BY_NAME[name]
    text, complaints = relink(document)
    assert not complaints, "code that a document quotes has changed: change it there, too"
    assert text == document.read_text(), "lines have moved: run python -m tests.links"


def anchors(document: Path) -> set[str]:
    """The anchors that GitHub makes of a document's headings."""
    headings = re.findall(r"^#+ (.+)$", prose(document.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@every_document
def test_links_lead_somewhere(name: str) -> None:
    document = BY_NAME[name]
    plain = CODE_LINK.sub("", prose(document.read_text()))
    pictures = [("picture", source) for source in re.findall(r'<img src="([^"]+)"', plain)]
    for text, target in re.findall(r"\[([^\]]*)\]\(([^)\s]+)\)", plain) + pictures:
        if target.startswith("https://"):
            continue
        file, _, anchor = target.partition("#")
        path = (document.parent / file).resolve() if file else document
        assert path.exists(), f"[{text}]({target})"
        if anchor:
            assert anchor in anchors(path), f"[{text}]({target}); there are {sorted(anchors(path))}"
        if path.suffix == ".py" and (identifier := re.fullmatch(r"`(\w+)(\.\.\.)?`", text)):
            end = "" if identifier[2] else r"\b"
            assert re.search(rf"\b(def|class) {identifier[1]}{end}", path.read_text()), f"[{text}]({target})"


@every_document
def test_what_is_named_exists(name: str) -> None:
    code = "\n".join(path.read_text() for path in ROOT.glob("tests/*.py"))
    for quoted in re.findall(r"`([^`\n]+)`", prose(BY_NAME[name].read_text())):
        if test := re.fullmatch(r"(test_\w+)(\.\.\.)?", quoted):  # a long name may be cut: a table has to fit
            assert f"def {test[1]}" + ("" if test[2] else "(") in code, quoted
        if re.fullmatch(r"(minirl|tests|benchmarks)/[\w/]+\.py", quoted) and "kl_penalty" not in quoted:
            assert (ROOT / quoted).is_file(), quoted


@every_document
def test_flags_exist(name: str) -> None:
    known = {flag for command in (*CONFIGS, *TOOLS) for flag in parser_of(shlex.split(f"python {command}"))}
    flags = {flag for quoted in re.findall(r"`([^`]+)`", prose(BY_NAME[name].read_text())) for flag in flags_in(quoted)}
    assert flags <= known | OTHERS, f"{sorted(flags - known - OTHERS)} are flags of nothing"


TOOLS = ("-m minirl.evaluate", "-m minirl.plots", *(f"benchmarks/{path.name}" for path in ROOT.glob("benchmarks/*.py")))
OTHERS = {  # of tensorboard, ruff, all, and torchrun
    *("--logdir", "--samples_per_plugin", "--check", "--help"),
    *("--nproc-per-node", "--nnodes", "--rdzv-endpoint", "--max-restarts", "--standalone"),
}


def flags_in(quoted: str) -> list[str]:
    return re.findall(r"(?:^|\s)(--[a-z][a-z_-]*)", quoted)


# Commands


class ParsedError(Exception):
    """Stops a program when it has made its parser."""

    def __init__(self, parser: argparse.ArgumentParser) -> None:
        super().__init__()
        self.parser = parser


def make_parser(command: list[str]) -> argparse.ArgumentParser | None:
    """The parser of `python FILE ...` or `python -m MODULE ...`; None if it takes no arguments."""
    module = command[1] == "-m"
    path = ROOT / (Path(*command[2].split(".")) if module else command[1])
    path = path / "__main__.py" if path.is_dir() else path.with_suffix(".py")
    if path.parent.name == "benchmarks" and "argparse" not in path.read_text():
        return None

    def stop(parser: argparse.ArgumentParser, *_: Any) -> NoReturn:
        raise ParsedError(parser)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", stop)
        patch.setattr(sys, "path", [str(ROOT if module else path.parent), *sys.path])
        try:
            runpy.run_path(str(path), run_name="__main__")
        except ParsedError as parsed:
            return parsed.parser
    raise AssertionError(f"{path} has not parsed its flags")


PARSERS: dict[str, argparse.ArgumentParser | None] = {}


def parser_of(command: list[str]) -> dict[str, argparse.Action]:
    """Map the flags of a program to what they do."""
    key = command[2] if command[1] == "-m" else command[1]
    if key not in PARSERS:
        PARSERS[key] = make_parser(command)
    parser = PARSERS[key]
    return {} if parser is None else parser._option_string_actions


def commands(text: str) -> list[str]:
    """The commands of a document, one line each: those of its shell blocks, and `python ...` within the text."""
    lines = [line for block in blocks(text, "") for line in block.replace("\\\n", " ").splitlines()]
    quoted = [quoted.replace("\n", " ") for quoted in re.findall(r"`([^`]+)`", prose(text))]
    return [
        line.removeprefix(".venv/bin/") for line in lines + quoted if re.match(r"(.venv/bin/)?(python|make) ", line)
    ]


def check_flags(command: list[str]) -> None:
    """Parse the flags of `python ...`, and make the config of a training."""
    if command[1:3] == ["-m", "pytest"]:
        assert Path(command[3]).exists()
        return
    if command[1:3] == ["-m", "tests.links"]:
        return
    parser_of(command)
    name = command[2] if command[1] == "-m" else command[1]
    parser, arguments = PARSERS[name], command[3 if command[1] == "-m" else 2 :]
    if parser is None:
        assert not arguments, f"{name} takes no arguments"
        return
    given = vars(parser.parse_args(arguments))
    if config_class := CONFIGS.get(name):
        fields = {field.name for field in dataclasses.fields(config_class)}
        config_class(**{field: value for field, value in given.items() if field in fields})


def every_command() -> list[str]:
    texts = [document.read_text() for document in DOCUMENTS if document.name != "changing.md"]
    return sorted({command for text in texts for command in commands(text)})


@pytest.mark.parametrize("command", every_command())
def test_commands_can_be_typed_as_written(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    words = shlex.split(command, comments=True)
    if words[0] == "make":
        target, *variables = words[1:]
        assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
        for variable in variables:
            name, _, value = variable.partition("=")
            assert name in ("ARGS", "PYTHON")
            if name == "ARGS":
                check_flags(["python", "train_ppo.py", *shlex.split(value)])
    else:
        check_flags(words)


def test_there_are_commands_to_check() -> None:
    found = every_command()
    assert {"python train_q.py", "python benchmarks/dqn_cartpole.py", 'make pong ARGS="--total-timesteps 20000"'} <= {
        command.split("  ")[0] for command in found
    }
    assert len(found) >= 30


def run(command: str, directory: Path) -> str:
    """Run a command as it is written, in a directory that has what a clone has; return what it printed."""
    words = shlex.split(command, comments=True)
    assert words[0] == "python"
    env = {**os.environ, "PYTHONPATH": str(directory), "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [sys.executable, *words[1:]], cwd=directory, env=env, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def clone(directory: Path) -> Path:
    """Copy the package and its scripts, without the tests."""
    shutil.copytree(ROOT / "minirl", directory / "minirl", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "recipes", directory / "recipes")
    for script in CONFIGS:
        shutil.copy(ROOT / script, directory)
    return directory


@pytest.mark.slow
def test_quick_commands_do_what_they_say(tmp_path: Path) -> None:
    """FrozenLake and Taxi take longer; their recipes are trained with in tests/test_q_learning.py."""
    clone(tmp_path)
    training_page = BY_NAME["training.md"].read_text()
    (snippet,) = [block for block in blocks(training_page, "python") if "gymnasium.register" in block]
    (tmp_path / "my_grids.py").write_text(snippet)
    training = [
        command
        for command in (*commands(README), *commands(training_page))
        if command.startswith("python train_q.py") and "frozenlake" not in command and "taxi" not in command
    ]
    assert len(training) >= 3
    printed = {command: run(command, tmp_path) for command in dict.fromkeys(training)}
    assert "| >:  94.06   | >:  96.02   | v:  98.00   |" in printed["python train_q.py"]
    assert "(3,3)" in printed["python train_q.py --env-id my_grids:Maze-v0"]

    (run_dir,) = (tmp_path / "runs/q_learning/minirl-GridWorld-v0").iterdir()
    for tool, command in [
        ("evaluate", "python -m minirl.evaluate RUN_DIR"),
        ("plots", "python -m minirl.plots RUN_DIR [RUN_DIR ...]"),
    ]:
        assert command in commands(README)
        printed[tool] = run(command.replace(" [RUN_DIR ...]", "").replace("RUN_DIR", str(run_dir)), tmp_path)
    assert "mean 97.00, standard deviation 0.00" in printed["evaluate"]
    assert Path(printed["plots"].strip()).stat().st_size > 1_000


# Snippets


def python_snippets() -> list[str]:
    return [block for path in DOCUMENTS for block in blocks(path.read_text(), "python")]


def test_a_snippet_prints_what_it_says() -> None:
    snippets = [snippet for snippet in python_snippets() if "print(log_prob.grad)" in snippet]
    assert len(snippets) == 1
    (promised,) = re.findall(r"print\(.*\)  # (tensor\(.*?\)):", snippets[0])
    printed = io.StringIO()
    with redirect_stdout(printed):
        exec(snippets[0], {})
    assert printed.getvalue().strip() == promised


def test_training_from_python_calls_what_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """The snippet takes a minute, so what it calls is replaced by something that checks the arguments."""
    calls: list[Any] = []

    def train(*args: Any, **kwargs: Any) -> None:
        inspect.signature(real_train).bind(*args, **kwargs)
        calls.append(args[0])

    def evaluate(*args: Any, **kwargs: Any) -> dict[str, float]:
        inspect.signature(real_evaluate).bind(*args, **kwargs)
        calls.append(args[0])
        return {"mean_return": -80.0}

    real_train, real_evaluate = minirl.ppo.train, minirl.evaluate.evaluate
    monkeypatch.setattr(minirl.ppo, "train", train)
    monkeypatch.setattr(minirl.evaluate, "evaluate", evaluate)
    (snippet,) = [snippet for snippet in python_snippets() if "from minirl.evaluate import evaluate" in snippet]
    exec(snippet, {"__name__": "__main__"})
    assert calls == [PPOConfig(env_id="Acrobot-v1", total_timesteps=50_000), "runs/acrobot"]


def patched(source: str, diff: str) -> str:
    """Apply a piece of a diff that has no line numbers."""
    lines = diff.splitlines(keepends=True)
    old = "".join(line[1:] for line in lines if line[0] != "+")
    assert source.count(old) == 1, f"on {source.count(old)} places of the code stands\n{old}"
    return source.replace(old, "".join(line[1:] for line in lines if line[0] != "-"))


def test_the_readmes_edit_can_be_made() -> None:
    (diff,) = blocks(README, "diff")
    assert "AdamW(" in patched((ROOT / "minirl/ppo.py").read_text(), diff)


@pytest.mark.slow
def test_the_worked_example(tmp_path: Path) -> None:
    text = section(BY_NAME["changing.md"].read_text(), "A worked example")
    diffs, (test,) = blocks(text, "diff"), blocks(text, "python")
    added = [line for diff in diffs for line in diff.splitlines() if line[0] == "+"]
    assert len(added) == 6
    assert len(added) + sum(1 for line in test.splitlines() if line.strip()) < 20
    names: dict[str, Any] = {}
    exec(test, names)
    with pytest.raises(TypeError, match="kl_coef"):  # red before the change
        names["test_the_penalty_by_hand"]()

    module = clone(tmp_path) / "minirl/ppo.py"
    for diff in diffs:
        module.write_text(patched(module.read_text(), diff))
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests/test_kl_penalty.py").write_text(test)
    test_command, train_command = commands(text)
    assert "1 passed" in run(test_command, tmp_path)
    run(train_command, tmp_path)
    (config,) = tmp_path.glob("runs/ppo/CartPole-v1/*/config.json")
    assert '"kl_coef": 1.0' in config.read_text()


# Metrics, versions

# Games are recorded on the grid alone.
SHORT: dict[str, tuple[Any, Any]] = {
    "PPO": (ppo.train, PPOConfig("CartPole-v1", total_timesteps=256, num_envs=2, num_steps=64, minibatch_size=64)),
    "DQN": (dqn.train, DQNConfig(total_timesteps=200, learning_starts=64, eval_frequency=100, eval_episodes=1)),
    "Q": (q_learning.train, QLearningConfig(num_episodes=10, video_frequency=50)),
    "RLHF": (
        rlhf.train,
        RLHFConfig(
            lm_steps=1, num_pairs=4, reward_batch_size=4, num_episodes=4, batch_size=4, minibatch_size=4, width=4
        ),
    ),
}


@pytest.mark.parametrize("algorithm", SHORT)
def test_the_glossary_has_every_tag_and_no_other(
    algorithm: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("minirl.texts.REVIEWS", 100)
    monkeypatch.setattr("minirl.rlhf.HELD_OUT", 16)
    train, config = SHORT[algorithm]
    train(config, run_dir=tmp_path / "run", device="cpu")
    events = EventAccumulator(str(tmp_path / "run"))
    events.Reload()
    tags = events.Tags()
    rows = re.findall(r"^\| `([\w/]+)` \| ([^|]+) \|", (ROOT / "docs/metrics.md").read_text(), re.MULTILINE)
    glossary = {tag for tag, by in rows if algorithm in by.split(", ") and (tag != "videos/game" or algorithm == "Q")}
    assert glossary == {*tags["scalars"], *tags["images"]}


def test_versions_agree() -> None:
    (version,) = re.findall(r"^version = (.+)$", (ROOT / "setup.cfg").read_text(), re.MULTILINE)
    citation = (ROOT / "CITATION.cff").read_text()
    assert f'version: "{version}"' in citation
    assert {"cff-version", "message", "title", "authors"} <= set(re.findall(r"^([\w-]+):", citation, re.MULTILINE))
    assert version in (ROOT / "CHANGELOG.md").read_text()
