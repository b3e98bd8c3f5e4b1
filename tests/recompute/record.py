"""Trains, and keeps what went into each update and what came out. Nothing of the package is changed: the environments
write down their steps (`tests.recorded`), and the function that `compiled` returns, compiled or not, is called by one
that looks at its arguments and at the weights before and after.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from minirl import dqn, ppo, q_learning
from minirl.envs.vector import VectorEnv
from minirl.fast.compiled import Compiled
from minirl.replay import Batch
from minirl.runs import checkpoints, resume
from tests import recorded
from tests.reference import Weights
from tests.scalars import read_scalars
from tests.test_resume import train_with_kills


@dataclass
class State:
    """Networks (the one that learns first) and moments at some time, in float64; how many steps Adam has done."""

    networks: list[Weights]
    moments: dict[str, tuple[Tensor, Tensor]]
    step: int


@dataclass
class Update:
    """What a gradient step was given, and what it returned."""

    before: State
    arguments: tuple[Any, ...]
    result: dict[str, Tensor]
    after: State


@dataclass
class Case:
    """A path through the package: an algorithm, settings, a network of one's own, kills."""

    module: Any  # ppo, dqn or q_learning
    config: Any
    own: type[nn.Module] | None = None
    kills: list[int] = field(default_factory=list)  # after so many calls of `Run.checkpoint` each time
    log_every: int = 70  # agent steps, of Double DQN


@dataclass
class Recording:
    """What a run left: each environment's raw steps, the updates in order, what was logged and returned."""

    steps: list[list[recorded.Step]]
    updates: list[Update]
    trained: set[str]  # names of the weights that are not frozen
    logged: dict[str, list[tuple[int, float]]]
    result: Any
    directory: Path


def doubled(value: Any) -> Any:
    """A copy, in float64."""
    if isinstance(value, dict):
        return {name: doubled(item) for name, item in value.items()}
    if isinstance(value, Batch):
        return Batch(*map(doubled, value))
    return value.detach().clone().contiguous().double() if isinstance(value, Tensor) else value


def state_of(bound: Sequence[Any]) -> State:
    networks = [item for item in bound if isinstance(item, nn.Module)]
    (optimizer,) = (item for item in bound if isinstance(item, torch.optim.Optimizer))
    names: dict[Tensor, str] = {weight: name for name, weight in networks[0].named_parameters()}
    states = {names[weight]: state for weight, state in optimizer.state.items() if state}
    return State(
        [doubled(network.state_dict()) for network in networks],
        {name: (doubled(state["exp_avg"]), doubled(state["exp_avg_sq"])) for name, state in states.items()},
        max((int(state["step"]) for state in states.values()), default=0),
    )


def record(case: Case, folder: Path) -> Recording:
    """Train, and return what happened."""
    module, config, directory = case.module, case.config, folder / "steps"
    directory.mkdir(parents=True)
    files = [directory / str(config.seed + row) for row in range(getattr(config, "num_envs", 1))]
    updates: dict[int, Update] = {}
    trained: set[str] = set()
    results: list[Any] = []

    def compiled(function: Callable[..., Any], *bound: Any, enabled: bool) -> Callable[..., Any]:
        call: Callable[..., Any] = original_compiled(function, *bound, enabled=enabled)
        if function is not module.gradient_step:
            return call
        trained.update(name for name, weight in bound[0].named_parameters() if weight.requires_grad)

        def watched(*arguments: Any) -> Any:
            before, given = state_of(bound), tuple(doubled(argument) for argument in arguments)
            result = call(*arguments)
            assert isinstance(call, Compiled) == enabled
            assert not isinstance(call, Compiled) or call.enabled, "it fell back"
            # A session that goes on from a checkpoint does again what was done after it.
            updates[before.step] = Update(before, given, doubled(result), state_of(bound))
            return result

        return watched

    def load_checkpoint(*arguments: Any, **options: Any) -> Any:
        saved = original_load(*arguments, **options)
        for file in files:
            recorded.keep(file, saved["global_step"] // len(files))
        return saved

    def train(*arguments: Any, **options: Any) -> None:
        results.append(original_train(*arguments, **options))

    original_load, original_train = checkpoints.load_checkpoint, module.train
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STEPS_DIR", str(directory))
        patch.setattr(resume, "load_checkpoint", load_checkpoint)
        if module is not q_learning:
            original_compiled = module.compiled
            patch.setattr(module, "compiled", compiled)
        if config.env_id == "frames":
            patch.setattr(
                module,
                "make_envs_of",
                lambda config, number, **how: VectorEnv(recorded.frames, number, num_workers=config.num_workers, **how),
            )
        if case.own is not None:
            patch.setattr(module, "ActorCritic" if module is ppo else "QNetwork", case.own)
        patch.setattr(dqn, "LOG_EVERY", case.log_every)
        train_with_kills(train, config, folder / "run", case.kills, patch)
    return Recording(
        [recorded.read(file) for file in files],
        [updates[number] for number in sorted(updates)],
        trained,
        read_scalars(folder / "run"),
        results[-1],
        directory,
    )
