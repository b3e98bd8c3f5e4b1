"""Keeping a GPU busy: asynchronous copies and CUDA graphs.

A network as small as Atari's keeps a GPU busy for less time than Python takes to launch its hundred kernels. Recorded
as a graph, they are one call with the same arithmetic: the same kernels, in the same order, on the same memory.

Assumed of PyTorch, from its documentation and source, and not yet seen on a GPU: `torch.cuda.graph` can record compiled
code once that has run twice; random numbers drawn in a replay continue from the generator's state, as in a call; an
optimiser counts its steps on the GPU (`capturable`). If recording fails, a warning says why, and the function is called
as before.
"""

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

RECORDED: tuple[str, ...] = ("cuda",)  # on these devices functions are recorded; on others they are called
PLAIN_CALLS = 2  # first: they load kernels, and show which inputs move from call to call
MOST = 10  # times that tensors not given with the call may move before recording is given up


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a CPU tensor to the device without waiting for it.

    It goes through pinned memory, which PyTorch keeps and reuses once the GPU has read it.
    """
    if device.type == "cpu":
        return tensor
    return torch.empty_like(tensor, pin_memory=True).copy_(tensor).to(device, non_blocking=True)


def fetch_async(tensor: Tensor) -> Callable[[], NDArray[Any]]:
    """Start copying a tensor to the CPU; return a function that waits for it. Other work can be done meanwhile."""
    if tensor.device.type == "cpu":
        return tensor.numpy
    here = torch.empty_like(tensor, device="cpu", pin_memory=True).copy_(tensor, non_blocking=True)
    arrived = torch.cuda.Event()
    arrived.record()

    def wait() -> NDArray[Any]:
        arrived.synchronize()
        array: NDArray[Any] = here.numpy()
        return array

    return wait


class Replayed:
    """A function of tensors: called twice, then recorded, and replayed from then on.

    A replay works on the memory that was recorded. An input given with the call, such as a batch, is copied there once
    it has been seen at another address. Anything else at another address, such as replaced weights, is a reason to
    record again. A call returns copies, which the next replay does not overwrite.

    Args:
        function: from tensors on one device to tensors without gradients; its Python must not read their values.
        of_the_call: whether an input is given with the call; such inputs are read and never changed.
        held: tensors that the function holds itself, such as an optimiser's state; they never move.
    """

    def __init__(
        self,
        function: Callable[..., Sequence[Any]],
        of_the_call: Callable[[Tensor], bool],
        held: Sequence[Tensor] = (),
    ) -> None:
        self.function = function
        self.of_the_call = of_the_call
        self.held = held
        self.calls = self.moves = 0
        self.still: list[int] = []  # which inputs are at the same address as before, and
        self.places: list[int] = []  # those addresses
        self.buffers: dict[int, Tensor] = {}  # for the other inputs
        self.replay: Callable[[], None] | None = None
        self.results: Sequence[Any] = ()
        self.enabled = True

    def __call__(self, *inputs: Tensor) -> Sequence[Any]:
        """Call the function."""
        if not self.enabled:
            return self.function(*inputs)
        if self.replay is None or [inputs[number].data_ptr() for number in self.still] != self.places:
            self.replay = None
            try:
                self._look(inputs)
                if self.calls > PLAIN_CALLS:
                    self._record(inputs)
            except Exception as error:
                self._give_up(error)
            if self.replay is None:
                return self.function(*inputs)
        self._fill_buffers(inputs)
        self.replay()
        return [result.clone() if isinstance(result, Tensor) else result for result in self.results]

    def _look(self, inputs: Sequence[Tensor]) -> None:
        """See where the inputs are in memory, and allocate buffers for those of the call that have moved."""
        self.calls += 1
        if not all(isinstance(given, Tensor) and given.device.type in RECORDED for given in (*inputs, *self.held)):
            raise RuntimeError("it reads a number that changes, or another tensor in the processor's memory")
        if self.calls == 1:
            self.still = list(range(len(inputs)))
        else:
            pairs = zip(self.still, self.places, strict=True)
            moved = [number for number, place in pairs if inputs[number].data_ptr() != place]
            of_the_call = [number for number in moved if self.of_the_call(inputs[number])]
            self.buffers |= {number: like(inputs[number]) for number in of_the_call}
            self.still = [number for number in self.still if number not in self.buffers]
            self.moves += len(moved) > len(of_the_call)
            if self.moves > MOST:
                raise RuntimeError(f"what it works on has moved more than {MOST} times")
        self.places = [inputs[number].data_ptr() for number in self.still]

    def _fill_buffers(self, inputs: Sequence[Tensor]) -> None:
        for number, buffer in self.buffers.items():
            buffer.copy_(inputs[number])

    def _record(self, inputs: Sequence[Tensor]) -> None:
        self._fill_buffers(inputs)
        places = [self.buffers.get(number, given) for number, given in enumerate(inputs)]
        replay, self.results = record(self.function, places)
        if any(isinstance(result, Tensor) and result.requires_grad for result in self.results):
            raise RuntimeError("a gradient is wanted of what it returns")
        self.replay = replay

    def _give_up(self, error: Exception) -> None:
        reason = str(error).strip().split("\n")[0]
        warnings.warn(f"recording failed, going on without: {reason}", stacklevel=1)
        self.enabled, self.results = False, ()
        self.buffers.clear()


def like(given: Tensor) -> Tensor:
    """Return uninitialised memory for a tensor like this one."""
    return torch.empty_strided(given.shape, given.stride(), dtype=given.dtype, device=given.device)


def record(
    function: Callable[..., Sequence[Any]], inputs: Sequence[Tensor]
) -> tuple[Callable[[], None], Sequence[Any]]:
    """Record what a function does, without doing it: return the replay, and where its results will be."""
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
    try:
        with torch.cuda.graph(graph):
            results = function(*inputs)
    finally:
        torch.cuda.set_stream(stream)  # an error in the middle leaves another stream current
    return graph.replay, results


def cuda_graphed(function: Callable[..., Any], device: torch.device) -> Callable[..., Any]:
    """Return the function, which is recorded and replayed on a GPU.

    Args:
        function: from tensors on the device and numbers to tensors; it changes none of them.
        device: where they are.
    """
    if device.type not in RECORDED:
        return function
    kinds: dict[Any, Replayed] = {}  # by the numbers and the tensors' shapes

    def call(*arguments: Any) -> Any:
        kind = tuple((*a.shape, *a.stride(), a.dtype) if isinstance(a, Tensor) else a for a in arguments)
        if kind not in kinds:
            numbers = [None if isinstance(a, Tensor) else a for a in arguments]

            def with_these_numbers(*tensors: Tensor) -> Any:
                given = iter(tensors)
                return function(*(next(given) if number is None else number for number in numbers))

            kinds[kind] = Replayed(with_these_numbers, lambda given: True)
        return kinds[kind](*(a for a in arguments if isinstance(a, Tensor)))

    return call
