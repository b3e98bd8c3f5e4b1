"""A whole run of RLHF: its report, evaluation and picture, its stages one after the other, the user's own texts."""

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from minirl import evaluate as evaluation
from minirl import plots, rlhf
from minirl.checks import ConfigError
from minirl.evaluate import evaluate
from minirl.evaluate.of_texts import _stages_done
from minirl.results.scores import read_scores
from minirl.rlhf import STAGES, RLHFConfig, train
from minirl.runs.checkpoints import load_checkpoint
from minirl.runs.directory import load_settings
from minirl.runs.flags import saved_config
from minirl.scripts.train import run_training
from tests.scalars import read_scalars
from tests.test_resume import assert_same

TINY: dict[str, Any] = {
    "width": 8,
    "num_layers": 1,
    "num_heads": 2,
    "minibatch_size": 4,
    "batch_size": 8,
    "reward_epochs": 2,
}
CONFIG = RLHFConfig(lm_steps=8, num_pairs=32, reward_batch_size=8, num_episodes=24, **TINY)
FLAGS = [f"--{name.replace('_', '-')}={value}" for name, value in dataclasses.asdict(CONFIG).items() if name in TINY]
FLAGS += ["--lm-steps=8", "--num-pairs=32", "--reward-batch-size=8", "--num-episodes=24", "--device=cpu"]


@pytest.fixture(autouse=True)
def _few_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("minirl.texts.REVIEWS", 100)
    monkeypatch.setattr("minirl.rlhf.HELD_OUT", 16)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("rlhf") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("minirl.texts.REVIEWS", 100)
        patch.setattr("minirl.rlhf.HELD_OUT", 16)
        train(CONFIG, run_dir=run_dir, device="cpu")
    return run_dir


def test_evaluation_is_of_new_texts_before_and_after(finished: Path, device: str) -> None:
    result = evaluate(finished, episodes=12, device=device)
    assert result == evaluate(finished, episodes=12, seed=42 + 10_000, device=device)
    assert result != evaluate(finished, episodes=12, seed=1, device=device)
    assert result["episodes"] == 12
    for side in ("before", "after"):
        assert list(result[side]) == ["reward_score", "kl", "hidden_score", "grammatical"]
    assert result["before"]["kl"] == pytest.approx(0, abs=1e-4), "it is the reference"
    assert result["after"]["kl"] != 0
    assert len(result["samples"]) == 5
    for sample in result["samples"]:
        assert sample["prompt"].endswith(" .")
        assert sample["before"].startswith(sample["prompt"])
        assert sample["after"].startswith(sample["prompt"])
    json.dumps(result)


def test_the_command_prints_json_or_a_table(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    evaluation.main([str(finished), "--episodes", "6", "--json"])
    assert json.loads(capsys.readouterr().out) == evaluate(finished, episodes=6)
    evaluation.main([str(finished), "--episodes", "6"])
    table = capsys.readouterr().out
    assert re.search(r"^6 texts +before +after$", table, re.MULTILINE)
    assert re.search(r"^hidden rule's score, of 1 +\d\.\d\d +\d\.\d\d$", table, re.MULTILINE)
    assert len(re.findall(r"^(before|after) ", table, re.MULTILINE)) == 10


def test_the_picture_shows_what_was_logged(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    scores, logged = read_scores(finished), read_scalars(finished)
    assert len(scores.kl) == 3, "an update each"
    assert scores.kl.tolist() == [value for _, value in logged["texts/kl"]]
    assert set(scores.scores) == {"texts/reward_score", "texts/hidden_score", "texts/grammatical"}
    figure = plots.draw_curves([finished, finished])
    assert [axes.get_title() for axes in figure.axes] == [
        "reward model's score",
        "hidden rule's score",
        "share that the grammar accepts",
    ]
    (line,) = figure.axes[1].lines
    assert np.asarray(line.get_ydata()).tolist() == scores.scores["texts/hidden_score"].tolist()
    plots.main([str(finished), "--output", str(tmp_path / "a.png")])
    assert capsys.readouterr().out == f"{tmp_path / 'a.png'}\n"
    assert (tmp_path / "a.png").stat().st_size > 1000


def test_a_script_goes_stage_by_stage_and_reports(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The language model alone, then the reward model, then PPO: the same as all at once."""
    run_dir = tmp_path / "run"
    run_training("rlhf", RLHFConfig, train, "", [*FLAGS, "--stage", "lm", "--run-dir", str(run_dir)])
    assert "after" not in evaluate(run_dir, episodes=2)
    assert "reward_score" not in evaluate(run_dir, episodes=2)["before"]
    run_training("rlhf", RLHFConfig, train, "", ["--stage", "reward", "--resume", str(run_dir), "--device", "cpu"])
    assert list(evaluate(run_dir, episodes=2)) == ["episodes", "before", "samples"]
    assert "reward_score" in evaluate(run_dir, episodes=2)["before"]
    capsys.readouterr()
    run_training("rlhf", RLHFConfig, train, "", ["--stage", "ppo", "--resume", str(run_dir), "--device", "cpu"])
    output = capsys.readouterr()
    assert "500 texts" in output.out
    assert output.out.endswith(f"{run_dir / 'curve.png'}\n")
    assert (run_dir / "curve.png").exists()
    assert "left out" not in output.err
    train(CONFIG, run_dir=tmp_path / "once", device="cpu")
    assert_same(load_checkpoint(run_dir, "rlhf"), load_checkpoint(tmp_path / "once", "rlhf"))
    with pytest.raises(SystemExit) as stop:
        run_training("rlhf", RLHFConfig, train, "", ["--stage", "lm", "--resume", str(run_dir), "--device", "cpu"])
    assert stop.value.code == 2
    assert "--stage and --num-episodes must go as far as the 408 texts" in capsys.readouterr().err


def test_a_longer_run_goes_on(finished: Path, tmp_path: Path) -> None:
    config = dataclasses.replace(CONFIG, num_episodes=16)
    train(config, run_dir=tmp_path / "run", device="cpu")
    train(dataclasses.replace(config, num_episodes=32), run_dir=tmp_path / "run", resume=True, device="cpu")
    assert len(read_scalars(tmp_path / "run")["texts/kl"]) == 4


@pytest.mark.parametrize("kind", ["characters", "bytes"])
def test_somebodys_own_texts_and_preferences(kind: str, tmp_path: Path) -> None:
    (tmp_path / "texts").write_text("größe\n" * 3 + "good dog\nbad dog\n", encoding="utf-8")
    pairs = [{"prompt": "the ", "chosen": "good dog", "rejected": "bad dog"}] * 20
    (tmp_path / "pairs").write_text("\n".join(map(json.dumps, [{**pair, "prompt": "do"} for pair in pairs])))
    own: dict[str, Any] = {"text": str(tmp_path / "texts"), "preferences": str(tmp_path / "pairs"), "tokens": kind}
    own["num_pairs"] = RLHFConfig.num_pairs  # the file has them
    policy = train(dataclasses.replace(CONFIG, **own), run_dir=tmp_path / "run", device="cpu")
    num_tokens = policy.body.token_embedding.num_embeddings
    assert num_tokens == (257 if kind == "bytes" else 1 + len(set("größegood dogbad dog")))
    result = evaluate(tmp_path / "run", episodes=3)
    assert list(result["after"]) == ["reward_score", "kl"], "there is no hidden rule of these"
    assert [sample["prompt"] for sample in result["samples"]] == ["do"] * 3
    assert "reward/best_accuracy" not in read_scalars(tmp_path / "run")
    plots.draw_curves([tmp_path / "run"])


def test_the_last_stage_is_evaluated_whatever_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    stages = (*STAGES[:-1], "dpo")
    for module in ("minirl.rlhf", "minirl.evaluate.of_texts"):
        monkeypatch.setattr(f"{module}.STAGES", stages)
    config = RLHFConfig()
    object.__setattr__(config, "stage", "dpo")
    ends = sum(config.plan(config.num_pairs)[stage] for stage in stages[:-1])
    assert _stages_done(config, None, ends) == (True, False)
    assert _stages_done(config, None, ends + 1) == (True, True)


def test_a_run_goes_on_with_the_texts_that_it_began_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("texts").write_text("good dog\nbad dog\n")
    config = dataclasses.replace(CONFIG, stage="lm", text="texts")
    train(config, run_dir="run", device="cpu")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    config = saved_config(RLHFConfig, tmp_path / "run", load_settings(tmp_path / "run"))
    train(config, run_dir=tmp_path / "run", resume=True, device="cpu")
    (tmp_path / "texts").write_text("bad dog\ngood dog\n")  # the same letters
    with pytest.raises(ConfigError, match="--text and --preferences must give the texts that the run began with: they"):
        train(config, run_dir=tmp_path / "run", resume=True, device="cpu")


def test_one_seed_gives_one_run_and_nothing_is_written_without_a_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    one, same, other = (train(dataclasses.replace(CONFIG, seed=seed), device="cpu").state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not torch.equal(one["body.token_embedding.weight"], other["body.token_embedding.weight"])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_it_learns_what_the_hidden_rule_likes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The default run in less: three quarters of the way to the best texts, and few nats."""
    monkeypatch.setattr("minirl.texts.REVIEWS", 10_000)
    monkeypatch.setattr(rlhf, "HELD_OUT", 1_000)
    config = RLHFConfig(lm_steps=1_000, num_pairs=3_072, num_episodes=128 * 24)
    train(config, run_dir=tmp_path / "run", device="cpu")
    before, after = (evaluate(tmp_path / "run", episodes=300)[side] for side in ("before", "after"))
    assert before["hidden_score"] == pytest.approx(0.5, abs=0.06)
    assert after["hidden_score"] > 0.85
    assert after["grammatical"] > 0.7  # the reward model has seen less than by default, and is followed too far
    assert after["kl"] < 10


def test_a_stage_begins_without_the_gradients_of_the_one_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """Clipping would count those of weights that somebody freezes in between, and a resumed run has none."""
    learn, seen = rlhf.train_policy, []

    def watched(policy: Any, *rest: Any) -> Any:
        seen.append([weight.grad for weight in policy.parameters()])
        yield from learn(policy, *rest)

    monkeypatch.setattr(rlhf, "train_policy", watched)
    train(CONFIG, device="cpu")
    assert len(seen) == 1
    assert all(gradient is None for gradient in seen[0])
