"""What a checkpoint holds besides networks, so that a killed run continues as if nothing had happened.

Environments are captured in the middle of their episodes (`minirl.envs.state`). A replay memory is too large to be
written in full each time: its transitions are written once, as they come, to files in the run directory, and a
checkpoint names the files that belong to it. Files are complete before a checkpoint names them, and stay until none
does, so that a kill at any moment leaves a checkpoint with its own memory.
"""

import dataclasses
import re
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from minirl.checks import ConfigError
from minirl.distributed import broadcast_from_rank_0, gather_to_rank_0, my_share, rank, world_size
from minirl.envs.state import CantCapture, OtherPart
from minirl.envs.vector import VectorEnv
from minirl.replay import ReplayBuffer
from minirl.runs.checkpoints import (
    State,
    atomic_file,
    brief,
    load_checkpoint,
    random_state,
    reading,
    set_random_state,
)
from minirl.runs.directory import load_settings
from minirl.runs.progress import say
from minirl.runs.restore_check import how_a_copy_differs
from minirl.runs.run import seed_everything
from minirl.runs.settings import as_text, flag_name
from minirl.streams import Stream, derived_seed

# Settings that a resumed run may change: how long to continue, and what changes results by rounding at most.
MAY_CHANGE = {
    *("total_timesteps", "num_episodes", "stage", "num_workers", "num_threads", "compile", "checkpoint_frequency"),
    "video_frequency",
}


def saved_run(
    algorithm: str, config: Any, run_dir: str | Path | None, resume: bool, *keys: str
) -> tuple[Path | None, State | None]:
    """Return the directory of a run, absolute, and its checkpoint if it is to be resumed, with these keys.

    Raises:
        ConfigError: if there is no checkpoint of this algorithm, or the run has other settings than `config`.
    """
    path = None if run_dir is None else Path(run_dir).absolute()  # environments may change the working directory

    def load() -> State:
        saved = load_checkpoint(path, algorithm, *keys)
        assert path is not None
        require_same_settings(config, load_settings(path))
        return saved

    return path, broadcast_from_rank_0(load) if resume else None


def require_same_settings(config: Any, settings: dict[str, Any]) -> None:
    """Raise a ConfigError, naming the flag, if a setting is not what the run has, and may not change."""
    for field in dataclasses.fields(config):
        name, value = field.name, getattr(config, field.name)
        kept = settings.get(name, field.default)  # a setting that is newer than the run
        if name not in MAY_CHANGE and value != kept:
            flag = f"{flag_name(name)} {as_text(value)}"
            raise ConfigError(f"{flag} can't go with --resume: the run has {as_text(kept)}; leave it out")


def env_state(envs: VectorEnv, obs: NDArray[Any]) -> State:
    """Return what a checkpoint holds of the environments: their states and observations.

    With several ranks, rank 0 returns this for all environments, with the random states of each rank. If they can't be
    captured, or a copy of one plays differently, a warning says so and there are no states.
    """
    states = None
    try:
        if envs.copy_difference is None:  # the first checkpoint
            envs.copy_difference = how_a_copy_differs(envs.make_env)
        if envs.copy_difference:
            raise CantCapture(envs.copy_difference)
        states = envs.capture()
    except CantCapture as error:
        warnings.warn(f"a resumed run will start new episodes, for these can't be saved: {error}", stacklevel=2)
    if world_size() == 1:
        return {"envs": states, "obs": torch.from_numpy(obs.copy())}
    ranks = gather_to_rank_0((states, obs.copy(), random_state()))
    if rank() != 0:
        return {}
    of_all = {
        "states": [state for states, _, _ in ranks for state in (states or {"states": []})["states"]],
        "generators": [(states or {}).get("generators") for states, _, _ in ranks],
    }
    return {
        "envs": of_all if all(states for states, _, _ in ranks) else None,
        "obs": torch.from_numpy(np.concatenate([obs for _, obs, _ in ranks])),
        "ranks": [random_state for _, _, random_state in ranks],
    }


def start_envs(envs: VectorEnv, seed: int, saved: State | None) -> NDArray[Any]:
    """Start the environments, or restore them and the random states from a checkpoint.

    Each rank has its own random numbers; those of rank 0 are the same as without other ranks.

    If one holds another thing than when it was saved (`OtherPart`), new episodes start, a line says why, and
    `saved["envs"]` becomes None, in one process.

    Returns:
        The observations, (N, ...).

    Raises:
        ConfigError: if the checkpoint comes from other environments.
    """
    if saved is None:
        if rank() != 0:
            seed_everything(derived_seed(seed, Stream.RANK, rank()))
        return envs.reset(seed=seed).copy()
    with reading(saved):
        saved = of_this_rank(saved, seed)
        obs: NDArray[Any] = saved["obs"].numpy()
        shape = (envs.num_envs, *(envs.observation_space.shape or ()))
        if obs.shape != shape:
            raise ValueError(f"the environments show {shape}, and its obs are {obs.shape}")
        try:
            if saved["envs"] is not None:
                envs.restore(saved["envs"])
        except OtherPart as error:
            say(f"the environments can't be put back, and start new episodes: {error}")
            saved["envs"] = None
    if saved["envs"] is None:
        obs = envs.reset(seed=derived_seed(seed, Stream.RESUMED, saved["global_step"])).copy()
    set_random_state(saved)
    return obs


def of_this_rank(saved: State, seed: int) -> State:
    """Return a checkpoint with this rank's part of the environments and random states.

    If it was saved by another number of ranks, environments are redistributed and random numbers start anew.
    """
    ranks, before = saved.get("ranks"), len(saved.get("ranks", [None]))
    if before == world_size() == 1:
        return saved
    mine, envs = my_share(len(saved["obs"])), saved["envs"]
    saved = {**saved, "obs": saved["obs"][mine]}
    if before == world_size():
        assert ranks is not None
        saved["random_state"] = ranks[rank()]
    else:
        if rank() == 0:
            say(f"{before} ranks saved this run, and {world_size()} go on with it: its bits differ from here on")
        seed_everything(derived_seed(seed, Stream.RANK, rank(), saved["global_step"]))
        saved["random_state"] = random_state()
    if envs is not None:
        generators = envs["generators"][rank()] if before == world_size() else []
        saved["envs"] = {"states": envs["states"][mine], "generators": generators}
    return saved


class MemoryFiles:
    """The files of a replay memory: each holds the transitions of each environment from one number to another.

    Args:
        run_dir: where they are; None for a run that writes nothing.
        name: what their names begin with; a second memory needs another.
    """

    def __init__(self, run_dir: Path | None, name: str = "memory") -> None:
        self.run_dir, self.name = run_dir, name
        self.spans: list[tuple[int, int]] = []

    def save(self, memory: ReplayBuffer) -> State:
        """Write what was added since the last call; return what a checkpoint holds of the memory."""
        assert self.run_dir is not None
        kept = {self._file(span) for span in self.spans}  # what belongs to the checkpoint on disk
        mine = re.compile(rf"\.?{re.escape(self.name)}-\d+-\d+\.npz(\.tmp)?")
        for file in self.run_dir.iterdir():
            if mine.fullmatch(file.name) and file not in kept:
                file.unlink()
        first = self.spans[-1][1] if self.spans else 0
        self.spans = [span for span in self.spans if span[1] > memory.added - memory.length]
        first = max(first, memory.added - memory.length)
        if memory.added > first:
            self.spans.append((first, memory.added))
            arrays: dict[str, Any] = memory.since(first)
            with atomic_file(self._file(self.spans[-1])) as temporary, temporary.open("wb") as stream:
                np.savez(stream, **arrays)
        return {"spans": self.spans, "counters": memory.counters()}

    def load(self, memory: ReplayBuffer, saved: State) -> None:
        """Fill the memory from the files that a checkpoint names; `saved` is what `save` returned.

        Raises:
            ConfigError: if one is missing, broken, or of another memory.
        """
        self.spans = [(first, end) for first, end in saved["spans"]]
        for span in self.spans:
            path = self._file(span)
            try:
                with np.load(path, allow_pickle=False) as arrays:
                    memory.put(span[0], dict(arrays))
            except Exception as error:  # zip files break in many ways
                why = f"can't be read: {brief(error)}"
                raise ConfigError(f"{path} must be part of this run's memory, and {why}") from error
        memory.set_counters(saved["counters"])

    def _file(self, span: tuple[int, int]) -> Path:
        assert self.run_dir is not None
        return self.run_dir / f"{self.name}-{span[0]}-{span[1]}.npz"
