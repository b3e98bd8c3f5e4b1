"""Atari preprocessing: one class per step, each usable on its own.

`make_atari_env` applies them in this order, with raw frames at the top and the network's input at the bottom:

    emulator            RGB frames (210, 160, 3), 60 per second, one action per frame
    NoopReset           start each game after 1 to 30 frames of doing nothing
    MaxAndSkip          one agent step = 4 frames: rewards summed, maximum over the last two frames
    EpisodeStatistics   score and length of the whole game
    EpisodicLife        a lost life ends the learner's episode, not the game
    FireReset           press FIRE where the game waits for it
    Grayscale           (210, 160)
    Resize              (84, 84)
    ClipReward          the sign of the reward
    Normalize           optional: float32 in [0, 1]
    FrameStack          (4, 84, 84)

The steps are those of Mnih et al. (2015), "Human-level control through deep reinforcement learning", as OpenAI's
baselines and then Stable-Baselines3 implemented them: the same seed and actions give the same frames, rewards and ends
as the latter's `AtariWrapper`, bit for bit. Only the stack differs from its `VecFrameStack`: it starts as four copies
of the first frame, not as three black ones.
"""

import functools
import sys
from typing import Any, SupportsFloat

import ale_py
import cv2
import gymnasium as gym
import numpy as np
from numpy.typing import NDArray

from minirl.checks import ConfigError, fingerprint
from minirl.envs.atari_fast import SkipAndShrink
from minirl.envs.episode import EpisodeStatistics, PlaysInReset
from minirl.envs.ids import is_atari, spec_of
from minirl.envs.state import layers_of

gym.register_envs(ale_py)
ale_py.ALEInterface.setLoggerMode(ale_py.LoggerMode.Error)  # no banner for each environment

Frame = NDArray[Any]  # uint8 everywhere except after Normalize
Info = dict[str, Any]
Options = dict[str, Any] | None
StepResult = tuple[Frame, SupportsFloat, bool, bool, Info]
AtariEnv = gym.Env[Frame, int]

NOOP = 0


class NoopReset(gym.Wrapper[Frame, int, Frame, int], PlaysInReset):
    """Do nothing for 1 to `noop_max` frames after each reset, so that no two games start alike.

    The number is drawn from the environment's own generator, which only a seeded reset sets. Rewards in these frames
    are in `reset_reward`, so that the score of the game stays complete.

    Raises:
        ValueError: if `noop_max` is below 1.
    """

    def __init__(self, env: AtariEnv, noop_max: int = 30) -> None:
        super().__init__(env)
        if noop_max < 1:
            raise ValueError(f"noop_max must be at least 1, not {noop_max}")
        self.noop_max = noop_max

    def reset(self, *, seed: int | None = None, options: Options = None) -> tuple[Frame, Info]:
        """Reset, then do nothing for a while."""
        obs, info = self.env.reset(seed=seed, options=options)
        self.reset_reward = 0.0
        for _ in range(self.unwrapped.np_random.integers(1, self.noop_max + 1)):
            obs, reward, terminated, truncated, info = self.env.step(NOOP)
            self.reset_reward += float(reward)
            if terminated or truncated:
                obs, info = self.env.reset(options=options)
                self.reset_reward = 0.0
        return obs, info


class MaxAndSkip(gym.Wrapper[Frame, int, Frame, int]):
    """Repeat each action for `skip` frames; return the sum of rewards and the maximum over the last two frames.

    The maximum is needed because the console draws some sprites only on even frames and some only on odd ones.

    Raises:
        ValueError: if `skip` is below 1.
    """

    def __init__(self, env: AtariEnv, skip: int = 4) -> None:
        super().__init__(env)
        if skip < 1:
            raise ValueError(f"skip must be at least 1, not {skip}")
        assert env.observation_space.shape is not None
        self.skip = skip
        self.last_two = np.zeros((2, *env.observation_space.shape), env.observation_space.dtype)

    def step(self, action: int) -> StepResult:
        """Take `skip` frames, or fewer if the episode ends before.

        An end before the last frame leaves older frames in the maximum, from the step before. If the game terminated,
        no update sees that image; if it was truncated, its value is bootstrapped from. This is kept so that games are
        bit for bit those of Stable-Baselines3.
        """
        total_reward = 0.0
        for frame_number in range(self.skip):
            frame, reward, terminated, truncated, info = self.env.step(action)
            total_reward += float(reward)
            if frame_number >= self.skip - 2:
                self.last_two[frame_number - self.skip] = frame
            if terminated or truncated:
                break
        return self.last_two[-self.skip :].max(axis=0), total_reward, terminated, truncated, info


class EpisodicLife(gym.Wrapper[Frame, int, Frame, int]):
    """End the learner's episode when a life is lost, without resetting the game.

    `terminated` is then True although the game goes on; the next `reset` plays one no-op in the same game.
    """

    def __init__(self, env: AtariEnv) -> None:
        super().__init__(env)
        self.lives = 0
        self.game_over = True

    def _count_lives(self) -> int:
        lives: int = self.unwrapped.ale.lives()  # type: ignore[attr-defined]
        return lives

    def step(self, action: int) -> StepResult:
        """Step; a lost life terminates."""
        obs, reward, terminated, truncated, info = self.env.step(action)
        self.game_over = terminated or truncated
        lives = self._count_lives()
        # Some games (Qbert) show zero lives for a few frames before they report the end: that loss must not be reported
        # twice. And lives can also be won.
        if 0 < lives < self.lives:
            terminated = True
        self.lives = lives
        return obs, reward, terminated, truncated, info

    def reset(self, *, seed: int | None = None, options: Options = None) -> tuple[Frame, Info]:
        """Start a new game if the last one is over or a seed is given; otherwise continue with the next life."""
        if self.game_over or seed is not None:
            obs, info = self.env.reset(seed=seed, options=options)
        else:
            obs, _, terminated, truncated, info = self.env.step(NOOP)
            if terminated or truncated:
                obs, reset_info = self.env.reset(options=options)
                info = _keep_episode(info, reset_info)
        self.lives = self._count_lives()
        return obs, info


class FireReset(gym.Wrapper[Frame, int, Frame, int]):
    """Press FIRE, then the next button of the game, after each reset: some games stand still until then.

    Raises:
        ValueError: if the game's second action is not FIRE, or it has fewer than three actions.
    """

    def __init__(self, env: AtariEnv) -> None:
        super().__init__(env)
        meanings = _action_meanings(env)
        if len(meanings) < 3 or meanings[1] != "FIRE":
            raise ValueError(f"FireReset needs a game with FIRE as its second action, not {meanings}")

    def reset(self, *, seed: int | None = None, options: Options = None) -> tuple[Frame, Info]:
        """Reset, then two agent steps: FIRE and action 2.

        If the second press ends the game, this returns the start of the next one; Stable-Baselines3 returns the last
        frame of the game that is over.
        """
        obs, info = self.env.reset(seed=seed, options=options)
        for button in (1, 2):
            obs, _, terminated, truncated, step_info = self.env.step(button)
            info = _keep_episode(info, step_info)
            if terminated or truncated:
                obs, reset_info = self.env.reset(options=options)
                info = _keep_episode(info, reset_info)
        return obs, info


class Grayscale(gym.ObservationWrapper[Frame, int, Frame]):
    """Turn RGB frames (H, W, 3) into luminance (H, W): 0.299 R + 0.587 G + 0.114 B, rounded."""

    def __init__(self, env: AtariEnv) -> None:
        super().__init__(env)
        space = env.observation_space
        assert isinstance(space, gym.spaces.Box)
        self.observation_space = gym.spaces.Box(space.low.min(), space.high.max(), space.shape[:2], space.dtype.type)

    def observation(self, observation: Frame) -> Frame:
        """(H, W, 3) -> (H, W)."""
        return cv2.cvtColor(observation, cv2.COLOR_RGB2GRAY)


class Resize(gym.ObservationWrapper[Frame, int, Frame]):
    """Shrink frames to (`size`, `size`), each pixel the mean of the area that it covers."""

    def __init__(self, env: AtariEnv, size: int = 84) -> None:
        super().__init__(env)
        if size < 1:
            raise ValueError(f"size must be at least 1, not {size}")
        space = env.observation_space
        assert isinstance(space, gym.spaces.Box)
        self.size = size
        self.shape = (size, size, *space.shape[2:])
        self.observation_space = gym.spaces.Box(space.low.min(), space.high.max(), self.shape, space.dtype.type)

    def observation(self, observation: Frame) -> Frame:
        """(H, W) -> (size, size), colours kept if there are any."""
        small = cv2.resize(observation, (self.size, self.size), interpolation=cv2.INTER_AREA)
        return small.reshape(self.shape)  # OpenCV drops an axis of 1


class ClipReward(gym.RewardWrapper[Frame, int]):
    """Replace the reward by its sign: -1, 0 or 1, whatever a game's points are."""

    def reward(self, reward: SupportsFloat) -> float:
        """Return the sign of the reward."""
        return float(np.sign(float(reward)))


class Normalize(gym.ObservationWrapper[Frame, int, Frame]):
    """Turn bytes into float32 in [0, 1], if floats are wanted early: four times the memory."""

    def __init__(self, env: AtariEnv) -> None:
        super().__init__(env)
        self.observation_space = gym.spaces.Box(0.0, 1.0, env.observation_space.shape, np.float32)

    def observation(self, observation: Frame) -> Frame:
        """Divide by 255."""
        return observation.astype(np.float32) / 255


class FrameStack(gym.Wrapper[Frame, int, Frame, int]):
    """Show the last `num_frames` frames together, oldest first: (num_frames, *frame shape).

    One image shows where the ball is, several show where it goes. After a reset the stack is `num_frames` copies of the
    first frame (as in the source notebook; Stable-Baselines3's `VecFrameStack` and Dopamine start from zeros).
    """

    def __init__(self, env: AtariEnv, num_frames: int = 4) -> None:
        super().__init__(env)
        if num_frames < 1:
            raise ValueError(f"num_frames must be at least 1, not {num_frames}")
        space = env.observation_space
        assert isinstance(space, gym.spaces.Box)
        self.num_frames = num_frames
        self.frames = np.zeros((num_frames, *space.shape), space.dtype)
        self.observation_space = gym.spaces.Box(
            np.repeat(space.low[None], num_frames, axis=0),
            np.repeat(space.high[None], num_frames, axis=0),
            dtype=space.dtype,
        )

    def reset(self, *, seed: int | None = None, options: Options = None) -> tuple[Frame, Info]:
        """Fill the stack with the first frame."""
        frame, info = self.env.reset(seed=seed, options=options)
        self.frames = np.repeat(frame[None], self.num_frames, axis=0)
        return self.frames.copy(), info

    def step(self, action: int) -> StepResult:
        """Drop the oldest frame, add the newest. Every step returns a new array, which may be changed."""
        frame, reward, terminated, truncated, info = self.env.step(action)
        self.frames = np.concatenate((self.frames[1:], frame[None]))
        return self.frames.copy(), reward, terminated, truncated, info


def make_atari_env(
    env_id: str,
    *,
    noop_max: int = 30,
    frame_skip: int = 4,
    frame_stack: int = 4,
    episodic_life: bool = True,
    clip_reward: bool = True,
    normalize: bool = False,
    render_mode: str | None = None,
    size: int = 84,
    fast: bool = False,
) -> AtariEnv:
    """Make an Atari game with all preprocessing: observations (frame_stack, 84, 84), uint8 or float32 if normalised.

    Both kinds of ids work: `PongNoFrameskip-v4` has no sticky actions, `ALE/Pong-v5` repeats the last action with
    probability 0.25 at each frame, as its authors recommend. The frame skip inside the latter is switched off, or it
    would skip twice. A game cut at 108,000 frames (half an hour) is `truncated`, not `terminated`.

    Args:
        env_id: a Gymnasium id of an Atari game.
        noop_max: maximum frames of doing nothing at the start of a game; 0 for none.
        frame_skip: frames per agent step.
        frame_stack: frames per observation.
        episodic_life: end the learner's episode at each lost life.
        clip_reward: learn from the sign of the reward.
        normalize: observations in [0, 1] instead of bytes.
        render_mode: Gymnasium's; `"rgb_array"` to record, `"human"` for a window.
        size: rows and columns of a frame.
        fast: let `SkipAndShrink` replace three of the wrappers, if they are exactly those that it reproduces.

    Returns:
        An environment whose `info["episode"]` is `{"r", "l"}` of the full game at its real end: r the unclipped score,
        l its length in agent steps.

    Raises:
        ConfigError: if `env_id` is not an Atari game.
    """
    if not is_atari(env_id):
        raise ConfigError(f"--env-id must be an Atari game here, not {env_id!r}")
    env = gym.make(spec_of(env_id), frameskip=1, render_mode=render_mode, disable_env_checker=True)
    if noop_max > 0:
        env = NoopReset(env, noop_max)
    env = MaxAndSkip(env, frame_skip)
    env = EpisodeStatistics(env)
    if episodic_life:
        env = EpisodicLife(env)
    if "FIRE" in _action_meanings(env):
        env = FireReset(env)
    env = Resize(Grayscale(env), size)
    if clip_reward:
        env = ClipReward(env)
    if normalize:
        env = Normalize(env)
    env = FrameStack(env, frame_stack)
    return faster(env) if fast and render_mode is None else env


# Fingerprints of the wrappers that `SkipAndShrink` replaces or bypasses: it may do so only if their code is this.
KNOWN = {
    NoopReset: "7f8e3dd73be1163c",
    MaxAndSkip: "279c2567d7e2d1a0",
    EpisodeStatistics: "a1858586d9d51a7a",
    EpisodicLife: "d84a683a12d9cbd9",
    FireReset: "22f41287774f9bd8",
    Grayscale: "618312bc472e7e60",
    Resize: "5d4d8c2efea573e0",
    FrameStack: "0f05d339e30aa236",
}
TRANSPARENT = (gym.wrappers.OrderEnforcing, gym.wrappers.PassiveEnvChecker)  # Gymnasium's


def faster(env: AtariEnv) -> AtariEnv:
    """Replace `MaxAndSkip`, `Grayscale` and `Resize` by `SkipAndShrink`: the same frames, rewards and ends.

    This is done if the environment has exactly these, with their code unchanged and nothing unknown between them and
    the emulator; otherwise it is returned as it is, and a line says so once.
    """
    layers = list(layers_of(env))
    kinds = [type(layer) for layer in layers]
    reason = why_not_faster(layers)
    if reason is not None:
        _say_once(f"Atari games are played by the plain wrappers, more slowly: {reason}")
        return env
    skip, resize = kinds.index(MaxAndSkip), kinds.index(Resize)
    smaller: Any = layers[resize]
    fast: Any = SkipAndShrink(layers[skip + 1], smaller.size)
    above: Any = layers[skip - 1]
    above.env = fast
    below_gray: Any = layers[resize + 2] if skip > resize + 2 else fast
    above_resize: Any = layers[resize - 1]
    above_resize.env = below_gray
    return env


def why_not_faster(layers: list[AtariEnv]) -> str | None:
    """Return why `SkipAndShrink` can't take the place of three of these layers, outermost first; None if it can."""
    kinds: list[type] = [type(layer) for layer in layers]
    if any(kinds.count(kind) != 1 for kind in (MaxAndSkip, Grayscale, Resize)):
        return "other wrappers skip, gray or shrink"
    changed = [kind.__name__ for kind in kinds if kind in KNOWN and fingerprint(kind) != KNOWN[kind]]
    if changed:
        return f"{' and '.join(changed)} is not what it was"
    resize, skip = kinds.index(Resize), kinds.index(MaxAndSkip)
    between, below = set(kinds[resize + 2 : skip]), set(kinds[skip + 1 : -1])
    passing_on = {EpisodeStatistics, EpisodicLife, FireReset}
    if kinds[resize + 1] is not Grayscale or not between <= passing_on or not below <= {NoopReset, *TRANSPARENT}:
        return "other wrappers lie between those that skip, gray and shrink, or below them"
    if not SkipAndShrink.fits(layers[skip], layers[resize]):
        return "their frames have other sizes"
    return None


def shows_stacks(env: gym.Env[Any, Any]) -> bool:
    """Whether each observation is the last frames of an episode, as from `FrameStack`: bytes, oldest first."""
    stacks = type(env) is FrameStack and env.observation_space.dtype == np.uint8
    if stacks and fingerprint(FrameStack) != KNOWN[FrameStack]:
        _say_once("observations are remembered whole, four times the memory: FrameStack is not what it was")
        return False
    return stacks


@functools.cache
def _say_once(text: str) -> None:
    print(text, file=sys.stderr)


def _action_meanings(env: AtariEnv) -> list[str]:
    meanings: list[str] = env.unwrapped.get_action_meanings()  # type: ignore[attr-defined]
    return meanings


def _keep_episode(earlier: Info, later: Info) -> Info:
    """Return `later` with the score of a game that ended before it, in a reset, so that no game is lost."""
    return {"episode": earlier["episode"], **later} if "episode" in earlier else later
