"""What a GPU records and replays. On the processor a stand-in replays; with `--device cuda` the GPU does."""

import functools
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from minirl.dqn import DQNConfig
from minirl.dqn import train as train_dqn
from minirl.fast import gpu
from minirl.fast.compiled import compiled
from minirl.fast.gpu import MOST, PLAIN_CALLS, Replayed, fetch, replayed, send
from minirl.ppo import PPOConfig, compute_gae, train
from minirl.runs.checkpoints import load_parts
from tests.test_compiled import CASES, steps
from tests.weights import parameters

Recording = tuple[Callable[[], None], Sequence[Any]]


def pretend(function: Callable[..., Sequence[Any]], inputs: Sequence[Tensor]) -> Recording:
    """Do as `gpu.record` does: the function is called, and nothing has happened; a replay works on the same memory.

    What it returns lies in memory of the recording, filled with nonsense until it is replayed.
    """
    before, random = [given.detach().clone() for given in inputs], torch.get_rng_state()
    results = [result.clone() for result in function(*inputs)]
    with torch.no_grad():
        for given, old in zip(inputs, before, strict=True):
            given.copy_(old)
        torch.set_rng_state(random)
        for result in results:
            result.fill_(77)

    def replay() -> None:
        with torch.no_grad():
            for result, new in zip(results, function(*inputs), strict=True):
                result.copy_(new)

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
    monkeypatch.setattr("minirl.fast.compiled.RECORDED", (device,))
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


@pytest.mark.parametrize("what", ["an error", "the processor's memory", "a gradient"])
def test_what_cannot_be_recorded_is_called_and_a_line_says_why(
    what: str, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(function: Any, inputs: Any) -> Recording:
        raise RuntimeError("operation not permitted when stream is capturing\nand a long trace")

    total, batch = torch.zeros(3, device=device), torch.ones(3, device=device)
    reason = "operation not permitted when stream is capturing$"
    function: Any = add_up
    if what == "an error":
        monkeypatch.setattr("minirl.fast.gpu.record", fail)
    elif what == "a gradient":
        weight = torch.ones(3, device=device, requires_grad=True)
        reason = "a gradient is wanted of what it returns"

        def function(total: Tensor, batch: Tensor) -> list[Tensor]:
            return [weight * add_up(total, batch)[0]]
    else:
        reason = "it reads a number that changes, or another tensor in the processor's memory"
        monkeypatch.setattr("minirl.fast.gpu.RECORDED", ("cuda",) if device == "cpu" else ("cpu",))
    step = Replayed(function, lambda given: given is batch)
    for _ in range(0 if "memory" in what else PLAIN_CALLS):
        step(total, batch)
    with pytest.warns(UserWarning, match=f"recording failed, going on without: {reason}"):
        step(total, batch)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        (doubled, *_) = step(total, batch)
    assert doubled.tolist() == [2 * value for value in total.tolist()] == [4.0 if "memory" in what else 8.0] * 3


@pytest.mark.parametrize("case", [case for case in CASES if "rates" in case or "another state" in case])
def test_a_compiled_step_that_is_replayed_is_the_plain_one_whatever_changes(
    case: str, device: str, recordings: list[str]
) -> None:
    """Rates and numbers of the loss, frozen layers, an optimiser's loaded state: as without recording."""
    plain, fast = (steps(case, device, enabled=enabled, count=10) for enabled in (False, True))
    assert fast[2].enabled, "it fell back"
    assert recordings
    torch.testing.assert_close(torch.stack(fast[0]), torch.stack(plain[0]), rtol=1e-3, atol=1e-4)
    if "BatchNorm" not in case:
        torch.testing.assert_close(parameters(fast[1]), parameters(plain[1]), rtol=1e-2, atol=1e-4)
    for mine, other in zip(fast[1].buffers(), plain[1].buffers(), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-2, atol=1e-2)


def test_random_numbers_go_on_in_a_replay(device: str, recordings: list[str]) -> None:
    def draw(network: nn.Module, inputs: Tensor) -> tuple[Tensor, Tensor]:
        numbers = torch.rand_like(inputs)
        return numbers, network(inputs)

    def drawn(enabled: bool) -> list[list[float]]:
        torch.manual_seed(3)
        network = nn.Linear(2, 2).to(device)
        function = compiled(draw, network, enabled=enabled)
        with torch.no_grad():
            return [function(torch.ones(2, 2, device=device))[0].flatten().tolist() for _ in range(6)]

    replays, plain = drawn(True), drawn(False)
    assert recordings == ["recorded"]
    assert replays == plain
    assert len({tuple(numbers) for numbers in replays}) == 6


def test_advantages_are_replayed_bit_for_bit(device: str, recordings: list[str]) -> None:
    gae = replayed(compute_gae, torch.device(device))
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
    assert replayed(compute_gae, torch.device(device)) is compute_gae


def test_what_is_sent_and_fetched_arrives(device: str) -> None:
    images = torch.arange(2 * 3 * 4 * 4, dtype=torch.uint8).reshape(2, 3, 4, 4)
    images = images.contiguous(memory_format=torch.channels_last)
    there = send(images, torch.device(device))
    assert there.device.type == device
    assert there.stride() == images.stride()
    arrived = fetch(there + 1)
    assert (arrived() == images.numpy() + 1).all()
    if device == "cpu":
        assert there is images, "no copy"


def test_a_step_waits_for_nothing(device: str) -> None:
    """On a GPU, PyTorch itself makes an error of it."""
    network, there = nn.Linear(4, 2).to(device), torch.device(device)
    optimizer = torch.optim.Adam(network.parameters(), lr=0.1)

    def learn(network: nn.Module, optimizer: torch.optim.Optimizer, inputs: Tensor, chosen: Tensor) -> Tensor:
        loss: Tensor = network(inputs[chosen]).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.detach()

    step, losses = compiled(learn, network, optimizer), list[Tensor]()
    inputs = send(torch.randn(32, 4), there)
    for number in range(8):
        if device == "cuda":
            torch.cuda.set_sync_debug_mode("error" if number > PLAIN_CALLS else "default")
        try:
            for chosen in torch.randperm(32, device=device).split(8):
                losses.append(step(inputs, chosen))
        finally:
            if device == "cuda":
                torch.cuda.set_sync_debug_mode("default")
    assert fetch(losses[-1])() < fetch(losses[0])()


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
TRAININGS: dict[str, Callable[[str], nn.Module]] = {
    "ppo": functools.partial(train, PPOConfig(env_id="CartPole-v1", num_envs=4, compile=True, **SMALL)),
    "dqn": functools.partial(
        train_dqn, DQNConfig(total_timesteps=400, learning_starts=100, eval_frequency=None, compile=True)
    ),
}


@pytest.mark.parametrize("algorithm", TRAININGS)
def test_a_recorded_training_ends_in_the_weights_of_one_that_is_not(
    algorithm: str, device: str, recordings: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="(recording|compilation) failed")
        recorded = parameters(TRAININGS[algorithm](device=device))
        assert len(recordings) >= (3 if algorithm == "ppo" else 1)  # acting, the update and the advantages
        monkeypatch.setattr("minirl.fast.gpu.RECORDED", ())
        monkeypatch.setattr("minirl.fast.compiled.RECORDED", ())
        plain = parameters(TRAININGS[algorithm](device=device))
    assert (recorded - plain).abs().max() <= 1e-4
