"""What a GPU records and replays. On the CPU a stand-in replays; with `--device cuda` the GPU does."""

import contextlib
import copy
import functools
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from minirl.dqn import DQNConfig
from minirl.dqn import train as train_dqn
from minirl.fast import gpu
from minirl.fast.compiled import compiled
from minirl.fast.gpu import MOST, PLAIN_CALLS, Replayed, cuda_graphed, fetch_async, to_device
from minirl.ppo import PPOConfig, compute_gae, train
from minirl.runs.checkpoints import load_parts
from tests.weights import parameters

Recording = tuple[Callable[[], None], Sequence[Any]]


def pretend(function: Callable[..., Sequence[Any]], inputs: Sequence[Tensor]) -> Recording:
    """As `gpu.record`: nothing is done yet; a replay works on this memory, and its results overwrite the last ones."""
    results: list[Tensor] = []

    def replay() -> None:
        new = function(*inputs)
        if not results:
            results.extend(torch.empty_like(result) for result in new)
        for result, value in zip(results, new, strict=True):
            result.copy_(value)

    return replay, results


@pytest.fixture(autouse=True)
def recordings(monkeypatch: pytest.MonkeyPatch, device: str) -> list[str]:
    """One entry for each recording."""
    made: list[str] = []
    record = gpu.record if device == "cuda" else pretend

    def counted(function: Any, inputs: Any) -> Recording:
        made.append("recorded")
        return record(function, inputs)

    monkeypatch.setattr("minirl.fast.gpu.record", counted)
    monkeypatch.setattr("minirl.fast.gpu.RECORDED", (device,))
    return made


def add_up(total: Tensor, batch: Tensor) -> list[Tensor]:
    """Change the first, read the second."""
    total.add_(batch)
    return [2 * total, batch.sum()]


def test_from_the_third_call_on_it_is_replayed_and_the_same(device: str, recordings: list[str]) -> None:
    total = torch.zeros(3, device=device)
    called: list[int] = []

    def function(total: Tensor, batch: Tensor) -> list[Tensor]:
        called.append(1)
        return add_up(total, batch)

    step = Replayed(function, lambda given: given is not total)
    kept, batches = [], [torch.full((3,), float(number), device=device) for number in range(1, 7)]  # each elsewhere
    for number, batch in enumerate(batches, start=1):
        kept.append(step(total, batch))
        assert len(recordings) == (number > PLAIN_CALLS)
    assert total.tolist() == [21.0] * 3
    assert [doubled.tolist() for doubled, _ in kept] == [[2.0 * n] * 3 for n in (1, 3, 6, 10, 15, 21)]
    assert [summed.item() for _, summed in kept] == [3.0 * n for n in range(1, 7)], "each has kept what it was"
    if device == "cuda":
        assert len(called) == PLAIN_CALLS + 1


def test_a_batch_that_moves_late_is_copied_from_then_on(device: str, recordings: list[str]) -> None:
    total, batch = torch.zeros(3, device=device), torch.ones(3, device=device)
    others = [torch.full((3,), 10.0, device=device) for _ in range(3)]
    step = Replayed(add_up, lambda given: given is not total)
    for given in [batch] * 4 + others + [batch] * 2:
        step(total, given)
    assert total.tolist() == [4 + 30 + 2.0] * 3
    assert len(recordings) == 2


def test_what_is_worked_on_may_lie_elsewhere_and_is_recorded_again(device: str, recordings: list[str]) -> None:
    totals = [torch.zeros(3, device=device) for _ in range(2)]
    batch = torch.ones(3, device=device)
    step = Replayed(add_up, lambda given: given is batch)
    for which in (0, 0, 0, 0, 1, 1, 1):
        step(totals[which], batch)
    assert [total.tolist() for total in totals] == [[4.0] * 3, [3.0] * 3]
    assert len(recordings) == 2


def test_what_moves_all_the_time_goes_without_and_a_line_says_so(device: str, recordings: list[str]) -> None:
    totals = [torch.zeros(3, device=device) for _ in range(40)]
    step = Replayed(add_up, lambda given: False)
    batch = torch.ones(3, device=device)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        for total in totals:
            step(total, batch)
    (warning,) = seen
    assert "recording failed, going on without: what it works on has moved more than" in str(warning.message)
    assert [total.tolist() for total in totals] == [[1.0] * 3] * 40
    assert len(recordings) <= MOST


@pytest.mark.parametrize("what", ["an error", "the processor's memory", "memory of another device", "a gradient"])
def test_what_cannot_be_recorded_is_called_and_a_line_says_why(
    what: str, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(function: Any, inputs: Any) -> Recording:
        raise RuntimeError("operation not permitted when stream is capturing\nand a long trace")

    total, batch = torch.zeros(3, device=device), torch.ones(3, device=device)
    reason = "operation not permitted when stream is capturing$"
    if what == "an error":
        monkeypatch.setattr("minirl.fast.gpu.record", fail)
    elif what == "a gradient":
        wanted = torch.ones(3, device=device, requires_grad=True)
        monkeypatch.setattr("minirl.fast.gpu.record", lambda function, inputs: (None, [wanted]))
        reason = "a gradient is wanted of what it returns"
    elif what == "memory of another device":
        reason = "it reads a number that changes, or another tensor"
    else:
        reason = "it reads a number that changes, or another tensor in the processor's memory"
        monkeypatch.setattr("minirl.fast.gpu.RECORDED", ("cuda",) if device == "cpu" else ("cpu",))
    held = [torch.empty(1, device="meta")] if what == "memory of another device" else []
    step = Replayed(add_up, lambda given: given is batch, held)
    for _ in range(0 if "memory" in what else PLAIN_CALLS):
        step(total, batch)
    with pytest.warns(UserWarning, match=f"recording failed, going on without: {reason}"):
        step(total, batch)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        (doubled, *_) = step(total, batch)
    assert doubled.tolist() == [2 * value for value in total.tolist()] == [4.0 if "memory" in what else 8.0] * 3


def learn(network: nn.Module, optimizer: torch.optim.Optimizer, inputs: Tensor, chosen: Tensor) -> Tensor:
    noise = torch.rand(3, device=inputs.device)
    loss: Tensor = network(inputs[chosen]).square().mean()
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(network.parameters(), 0.5, foreach=False)
    optimizer.step()
    return torch.cat([loss.detach()[None], noise])


def learned(device: str, *, enabled: bool) -> tuple[Tensor, Tensor]:
    """The weights after ten steps, and what each step returned.

    In between the rate is annealed, an optimiser's state is loaded, and the samples move.
    """
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Tanh(), nn.Linear(8, 2)).to(device)
    optimizer = torch.optim.Adam(network.parameters(), lr=0.01, fused=True)
    step: Any = compiled(learn, network, optimizer, enabled=enabled)
    returned = []
    for number in range(10):
        if number in (0, 8):
            inputs = to_device(torch.randn(32, 4), torch.device(device))
        if number == 6:
            optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        optimizer.param_groups[0]["lr"] = 0.01 / (number + 1)
        chosen = torch.randperm(32, device=device)[:8]
        with never_waiting(enabled and device == "cuda" and number in (4, 5)):
            returned.append(step(inputs, chosen))
    assert not enabled or step.enabled, "it fell back"
    return parameters(network).cpu(), torch.stack(returned).cpu()


@contextlib.contextmanager
def never_waiting(enabled: bool) -> Iterator[None]:
    """On a GPU, PyTorch raises an error if something waits for it."""
    if enabled:
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        if enabled:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.slow
def test_a_compiled_step_that_is_replayed_is_the_plain_one(device: str, recordings: list[str]) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="(recording|compilation) failed")
        weights, returned = learned(device, enabled=True)
    assert len(recordings) == 2, "once, and once more with the state that was loaded"
    plain_weights, plain_returned = learned(device, enabled=False)
    torch.testing.assert_close(weights, plain_weights, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(returned, plain_returned, rtol=1e-4, atol=1e-5)
    assert torch.equal(returned[:, 1:], plain_returned[:, 1:]), "random numbers are those of the plain function"
    assert len(returned[:, 1].unique()) == 10


def test_advantages_are_replayed_bit_for_bit(device: str, recordings: list[str]) -> None:
    gae = cuda_graphed(compute_gae, torch.device(device))
    torch.manual_seed(0)
    for number in range(6):
        num_envs = 2 if number < 5 else 3  # another shape is another recording
        rewards, values, next_values = torch.randn(3, 8, num_envs, device=device)
        terminated, truncated = torch.rand(2, 8, num_envs, device=device) < 0.2
        arguments = (rewards, values, next_values, terminated, truncated)
        for numbers in ((0.9, 0.8), (0.99, 0.95)):
            for mine, plain in zip(gae(*arguments, *numbers), compute_gae(*arguments, *numbers), strict=True):
                assert torch.equal(mine, plain)
    assert len(recordings) >= 2


def test_on_other_devices_a_function_is_itself(monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    monkeypatch.setattr("minirl.fast.gpu.RECORDED", ())
    assert cuda_graphed(compute_gae, torch.device(device)) is compute_gae


def test_what_is_sent_and_fetched_arrives(device: str) -> None:
    images = torch.arange(2 * 3 * 4 * 4, dtype=torch.uint8).reshape(2, 3, 4, 4)
    images = images.contiguous(memory_format=torch.channels_last)
    there = to_device(images, torch.device(device))
    assert there.device.type == device
    assert there.stride() == images.stride()
    arrived = fetch_async(there + 1)
    assert (arrived() == images.numpy() + 1).all()
    if device == "cpu":
        assert there is images, "no copy"


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.AdamW, torch.optim.RMSprop])
def test_an_optimiser_that_counted_on_a_gpu_goes_on_on_a_processor(kind: Any) -> None:
    weight = nn.Parameter(torch.tensor([3.0]))
    optimizer = kind([weight], lr=0.1)
    weight.grad = torch.ones(1)
    optimizer.step()
    saved = optimizer.state_dict()
    saved["param_groups"][0]["capturable"] = True  # as a recorded step needs it
    load_parts({"optimizer": optimizer}, {"optimizer": saved, "path": "checkpoint.pt"})
    optimizer.step()
    assert weight.item() < 2.85


SMALL: dict[str, Any] = {"num_steps": 16, "minibatch_size": 32, "total_timesteps": 8 * 64}
TRAININGS: dict[str, Any] = {
    "ppo": functools.partial(train, PPOConfig(env_id="CartPole-v1", num_envs=4, compile=True, **SMALL)),
    "dqn": functools.partial(
        train_dqn, DQNConfig(total_timesteps=400, learning_starts=100, eval_frequency=None, compile=True)
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", TRAININGS)
def test_a_recorded_training_ends_in_the_weights_of_one_that_is_not(
    algorithm: str, device: str, recordings: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="(recording|compilation) failed")
        recorded = parameters(TRAININGS[algorithm](device=device))
        assert len(recordings) >= (3 if algorithm == "ppo" else 1)  # acting, the update and the advantages
        monkeypatch.setattr("minirl.fast.gpu.RECORDED", ())
        plain = parameters(TRAININGS[algorithm](device=device))
    assert (recorded - plain).abs().max() <= 1e-4
