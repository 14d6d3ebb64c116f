"""Weights in a file that processes of one machine map: written once by the learner, read by every engine."""

from __future__ import annotations

import asyncio
import math
import os
import time
import weakref
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, TypeVar, cast

import torch
from torch import Tensor
from xxhash import xxh3_128

from skyrl_train import compute
from skyrl_train.weights.base import PushFailed

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from skyrl_train.engine.base import Engine, LoadingEngine
    from skyrl_train.engine.pool import EnginePool
    from skyrl_train.learner.base import Learner  # these import from this room
    from skyrl_train.weights.sent import SentWeights

T = TypeVar("T")
ALIGNMENT = 64  # bytes; a tensor that is mapped begins where vector loads like it


class SharedTensor(NamedTuple):
    """The place of one tensor in the file. `dtype` is torch's name of it, such as "bfloat16"."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    first_byte: int

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * getattr(torch, self.dtype).itemsize


@dataclass(frozen=True, slots=True)
class SharedWeights:
    """All weights of one policy version in one file: small enough to be sent to every engine.

    `digest` is XXH3's 128 bits over the whole file. It finds damage and mix-ups.
    """

    path: Path
    version: int
    tensors: tuple[SharedTensor, ...]
    digest: str

    def __post_init__(self) -> None:
        if not self.tensors:
            raise ValueError(f"{self.path}: a file without weights")
        [(name, times)] = Counter(tensor.name for tensor in self.tensors).most_common(1)
        if times > 1:
            raise ValueError(f"{self.path}: the weight {name} comes {times} times")

    @property
    def num_bytes(self) -> int:
        """Size of the file: the tensors follow each other, and the last one ends it."""
        return self.tensors[-1].first_byte + self.tensors[-1].num_bytes


def write_shared(named: Iterable[tuple[str, Tensor]], path: Path, version: int) -> SharedWeights:
    """Write the tensors one after the other into the file `path`, and return what a reader needs.

    Each tensor may be freed once the next one is asked for. What an earlier process left under this name is replaced.
    An error leaves no file.
    """
    tensors: list[SharedTensor] = []
    digest, end = xxh3_128(), 0
    try:
        with open(path, "wb", buffering=0, opener=_for_this_user) as file:
            for name, tensor in named:
                padding = bytes(-end % ALIGNMENT)
                numbers = memoryview(_bytes_of(tensor).numpy())
                for piece in (padding, numbers):
                    _write_all(file.fileno(), piece)
                    digest.update(piece)
                dtype, shape = str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape)
                tensors.append(SharedTensor(name, dtype, shape, end + len(padding)))
                end += len(padding) + len(numbers)
        return SharedWeights(path, version, tuple(tensors), digest.hexdigest())
    except BaseException:
        if not path.is_symlink():  # memory without a name, /proc/PID/fd/N, goes with the process that owns it
            path.unlink(missing_ok=True)
        raise


def read_shared(shared: SharedWeights) -> Iterator[tuple[str, Tensor]]:
    """Map the file and return its tensors by name, in the order in which they were written. Nothing is copied.

    The tensors stay valid after the file is removed. ValueError if the file is not what `shared` describes, before the
    first tensor is returned.
    """
    found = os.stat(shared.path).st_size
    if found != shared.num_bytes:
        raise ValueError(f"{shared.path} has {found:,} bytes, and {shared.num_bytes:,} were written")
    mapped = torch.from_file(str(shared.path), shared=False, size=found, dtype=torch.uint8)
    if xxh3_128(memoryview(mapped.numpy())).hexdigest() != shared.digest:
        raise ValueError(f"{shared.path} does not hold the weights of version {shared.version}: its digest differs")
    return ((tensor.name, view_of(mapped, tensor)) for tensor in shared.tensors)


def view_of(mapped: Tensor, tensor: SharedTensor) -> Tensor:
    """Return the tensor that lies at its place in a flat buffer."""
    numbers = mapped[tensor.first_byte : tensor.first_byte + tensor.num_bytes]
    return numbers.view(getattr(torch, tensor.dtype)).view(tensor.shape)


def _bytes_of(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)


def _for_this_user(path: str, flags: int) -> int:
    return os.open(path, flags, mode=0o600)


def _write_all(descriptor: int, piece: bytes | memoryview) -> None:
    """Write every byte: one call of the system writes at most 2 GiB."""
    rest = memoryview(piece)
    while rest:
        rest = rest[os.write(descriptor, rest) :]


# What rounding alone may move the logprob of a token by, on average over the proof's: bfloat16's was measured between
# 0.03 and 0.05 on a model of 135M weights. A head that was left behind moves it by several.
LARGEST_MEAN_DIFFERENCE = {torch.float32: 1e-3, torch.float16: 0.05, torch.bfloat16: 0.3}
PROOF_TEXT = "The 3 quick brown foxes said: {'answer': 42} != [0.5, -7]; why? Because x = y**2 + 1, naturally!\n"
PUBLISH_S = 120.0  # seconds that a learner may write for; a rank that dies ends the wait at once
BYTES_PER_S = 100e6  # a slow machine's; what loading may take grows with the weights


class SharedMemoryWeights:
    """Pushes weights through memory that the learner's first rank writes and every engine of this machine maps.

    Engines of other machines map a copy of it (cluster/machine.py).

    The memory has no name: it is a file that only this process holds open, /proc/PID/fd/N to the others. So nothing is
    left of it when the processes have gone, however they end.
    """

    way_around = ""  # the end of PushFailed's words: what to try where pushes fail

    def __init__(
        self, proof_ids: list[int], compute_dtype: torch.dtype, *, deadline_s: float = 10.0, takes_turns: bool = False
    ) -> None:
        """proof_ids: the prompt of the proof, see `proof_ids_of`. deadline_s: what one answer of an engine may take.

        takes_turns: learner and engines share GPUs, so the engines sleep from the end of a rollout to the next push.
        """
        if len(proof_ids) < 2:
            raise ValueError(f"{len(proof_ids)} tokens prove nothing: the first has no logprob")
        self._proof_ids, self._deadline_s, self._takes_turns = proof_ids, deadline_s, takes_turns
        self._limit = LARGEST_MEAN_DIFFERENCE[compute_dtype]
        self.metrics: dict[str, float] = {}

    async def before_update(self, engine: Engine) -> None:
        """Let the engines sleep, if they take turns with the learner. PushFailed if they do not answer in time."""
        if not self._takes_turns:
            return
        try:
            sleeping = cast("LoadingEngine", engine).sleep()
            await within(self._deadline_s, "giving its memory back", sleeping)
        except (RuntimeError, OSError, ValueError) as error:
            raise PushFailed(
                f"the engine did not give the learner the memory of the GPU they share: {error}"
            ) from error

    async def push(self, learner: Learner, engine: Engine) -> None:
        """Pause the engine, hand it the learner's weights, compare the logprobs of one prompt, and resume it.

        PushFailed says which of these failed. Then nothing samples from half of the weights: the engine stays paused
        with the old ones, or, if it was loading or its logprobs are wrong, it is closed.
        """
        started, version = time.monotonic(), learner.policy_version
        try:
            await within(self._deadline_s, "pausing the engine", engine.pause())
            num_bytes, differences = await self._replace(learner, cast("LoadingEngine", engine))
            await within(self._deadline_s, "the engine", engine.weights_changed(version))
            await within(self._deadline_s, "resuming the engine", engine.resume())
        except (RuntimeError, OSError, ValueError) as error:
            raise PushFailed(
                f"the weights of policy version {version} did not reach the engine, which samples nothing more: {error}"
                f"{self.way_around}"
            ) from error
        self.metrics = {
            "weights/push_seconds": time.monotonic() - started,
            "weights/megabytes": num_bytes / 1e6,
            "weights/mean_logprob_difference": sum(differences) / len(differences),
            "weights/max_logprob_difference": max(differences),
        }

    async def _replace(self, learner: Learner, engine: LoadingEngine) -> tuple[int, list[float]]:
        """Return the bytes that were loaded, and how far the engine's logprobs are from the learner's afterwards."""
        memory = SharedMemory()
        try:
            shared = await within(PUBLISH_S, "the learner's writing", computed(learner.publish, memory.path))
            differences = await self._load(shared, learner, engine)
        except BaseException:
            memory.empty()
            raise
        memory.close()
        return shared.num_bytes, differences

    async def _load(self, shared: SharedWeights | SentWeights, learner: Learner, engine: LoadingEngine) -> list[float]:
        """Return the differences of the proof. Closes the engine if they are too large or do not come at all."""
        is_proven = False
        try:
            seconds = self._deadline_s + shared.num_bytes / BYTES_PER_S
            await within(seconds, "loading the weights", cast("EnginePool", engine).load_weights(shared))
            differences = await self._proof(learner, engine)
            is_proven = True
            return differences
        finally:
            if not is_proven:  # an engine that is silent may not even close
                await asyncio.wait((asyncio.ensure_future(engine.close()),), timeout=self._deadline_s)

    async def _proof(self, learner: Learner, engine: LoadingEngine) -> list[float]:
        ids = self._proof_ids[: engine.max_model_len - 1]
        ours = await within(PUBLISH_S, "the learner's proof", computed(learner.logprobs_of_tokens, ids))
        theirs = await within(self._deadline_s, "the engine's proof", engine.logprobs_of_tokens(ids))
        differences = [abs(one - other) for one, other in zip(ours, theirs, strict=True)]
        mean = sum(differences) / len(differences)
        if not mean <= self._limit:  # not a number is no proof either
            raise ValueError(
                f"the engine's logprobs of {len(differences)} tokens differ from the learner's by {mean:.2g} on "
                f"average, and rounding explains {self._limit:g}: it does not compute with the learner's weights"
            )
        return differences


def proof_ids_of(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the tokens whose logprobs engine and learner compare after every push."""
    return tokenizer.encode(PROOF_TEXT, add_special_tokens=False)


class SharedMemory:
    """A file in memory without a name. Whoever has it mapped keeps it; it goes with the last of them."""

    def __init__(self) -> None:
        self._descriptor = os.memfd_create("skyrl-weights")
        self.path = Path(f"/proc/{os.getpid()}/fd/{self._descriptor}")

    def close(self) -> None:
        os.close(self._descriptor)

    def empty(self) -> None:
        """Give the memory back, and keep the number: a rank that writes too late must not find another file there."""
        os.ftruncate(self._descriptor, 0)


class OpenWeights:
    """Weights whose file stays readable after it is unlinked, for engines that are started later.

    `shared` names this process's descriptor of the file. So nothing is left of it when this process ends, in any way.
    """

    def __init__(self, shared: SharedWeights) -> None:
        descriptor = os.open(shared.path, os.O_RDONLY)
        weakref.finalize(self, os.close, descriptor)
        self.shared = replace(shared, path=Path(f"/proc/{os.getpid()}/fd/{descriptor}"))

    @property
    def version(self) -> int:
        return self.shared.version

    async def at_hand(self) -> SharedWeights | None:
        """Return them: they are always at hand."""
        return self.shared


def computed(call: Callable[..., T], *args: object) -> asyncio.Future[T]:
    """Return the result of a call in the compute thread."""
    return asyncio.wrap_future(compute.submit(call, *args))


async def within(seconds: float, what: str, answer: Awaitable[T]) -> T:
    """Return the answer. TimeoutError, which says what it was, if it takes longer."""
    try:
        return await asyncio.wait_for(answer, seconds)
    except TimeoutError as error:
        raise TimeoutError(f"{what} took longer than {seconds:g} seconds") from error
