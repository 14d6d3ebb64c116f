"""vLLM's side of a weight transfer: its worker replaces every weight by what the learner has written or sends.

vLLM imports this module in each worker, because `SharedWeightsWorker` is its `worker_extension_cls`.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

from skyrl_train.engine.vllm.samplers import temper
from skyrl_train.weights.broadcast import Broadcast, Receiver
from skyrl_train.weights.ipc import Handles
from skyrl_train.weights.shared_memory import SharedTensor, SharedWeights, read_shared

BACKEND = "skyrl"
# It warns at every push of layers without weights, the rotary embedding's. `check_whole` knows which really lack some.
logging.getLogger("vllm.model_executor.model_loader.reload.layerwise").setLevel(logging.ERROR)


@dataclass
class NoInfo(WeightTransferInitInfo):
    """Nothing is agreed upon beforehand: each update says where its weights are."""


@dataclass
class Announced(WeightTransferUpdateInfo):
    """A SharedWeights or a Broadcast as the message between vLLM's processes carries it: in plain types.

    engine: a name that no other engine of the run has. file, broadcast: the fields of the one or of the other.
    """

    engine: str
    file: dict[str, Any] | None = None
    broadcast: dict[str, Any] | None = None

    @classmethod
    def of(cls, weights: SharedWeights | Broadcast, engine: str) -> dict[str, Any]:
        if isinstance(weights, Broadcast):
            changes = {"buckets": list(map(plain, weights.buckets)), "handles": dict(weights.handles)}
            return {"engine": engine, "broadcast": asdict(weights) | changes}
        file = {"path": str(weights.path), "tensors": plain(weights.tensors)}
        return {"engine": engine, "file": asdict(weights) | file}

    @property
    def weights(self) -> SharedWeights | Broadcast:
        changes: dict[str, Any]
        if self.broadcast is not None:
            handles = {key: Handles(port, readers) for key, (port, readers) in self.broadcast["handles"].items()}
            changes = {"buckets": tuple(map(tensors_of, self.broadcast["buckets"])), "handles": handles}
            return Broadcast(**(self.broadcast | changes))
        assert self.file is not None, "either a file or a broadcast"
        changes = {"path": Path(self.file["path"]), "tensors": tensors_of(self.file["tensors"])}
        return SharedWeights(**(self.file | changes))


def plain(tensors: Iterable[SharedTensor]) -> list[list[Any]]:
    return [list(tensor) for tensor in tensors]


def tensors_of(lists: Iterable[Any]) -> tuple[SharedTensor, ...]:
    return tuple(SharedTensor(name, dtype, tuple(shape), first) for name, dtype, shape, first in lists)


class LearnersWeights(WeightTransferEngine[NoInfo, Announced]):
    """Replaces all weights by those of one file or of one broadcast. An update is one chunk: the whole model."""

    init_info_cls, update_info_cls = NoInfo, Announced
    _receiver: Receiver | None = None

    def init_transfer_engine(self, init_info: NoInfo) -> None:
        pass

    def start_weight_update(self) -> None:
        """Do nothing yet: the model is opened once what was announced has been checked."""

    def receive_weights(self, update_info: Announced) -> None:
        """Check what was announced, then hand the tensors to the model layer by layer."""
        weights = update_info.weights
        named = self._received(weights, update_info.engine)
        check_whole(weights, self._shapes())
        initialize_layerwise_reload(self.model)
        model: Any = self.model
        model.load_weights(named)

    def finish_weight_update(self) -> None:
        finalize_layerwise_reload(self.model, self.model_config)
        repack(self.model.modules())

    def shutdown(self) -> None:
        if self._receiver is not None:
            self._receiver.close()

    def _received(self, weights: SharedWeights | Broadcast, engine: str) -> Iterator[tuple[str, Tensor]]:
        if isinstance(weights, SharedWeights):
            return read_shared(weights)
        if self._receiver is None:
            parallel = self.parallel_config
            self._receiver = Receiver(engine, self.device, parallel.rank, parallel.world_size)
        return self._receiver.receive(weights)

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the parameters of the model as transformers, and so the learner, names them."""
        with torch.device("meta"):
            module = AutoModelForCausalLM.from_config(
                self.model_config.hf_config, trust_remote_code=self.model_config.trust_remote_code
            )
        return {name: tuple(parameter.shape) for name, parameter in module.named_parameters()}


class SharedWeightsWorker:
    """Added to the bases of vLLM's worker. Importing this module has registered the transfer."""

    model_runner: Any

    def return_learners_logprobs(self) -> None:
        temper(self.model_runner)


def check_whole(weights: SharedWeights | Broadcast, shapes: dict[str, tuple[int, ...]]) -> None:
    """Raise ValueError unless exactly the model's weights come: vLLM would leave old ones in silence."""
    sent = {tensor.name: tensor.shape for tensor in weights.tensors}
    for names, says in (
        (shapes.keys() - sent.keys(), "lacks"),
        (sent.keys() - shapes.keys(), "has, unlike the model,"),
    ):
        if names:
            raise ValueError(f"version {weights.version} {says} {len(names)} weights, {min(names)} among them")
    for name, shape in sent.items():
        if shape != shapes[name]:
            raise ValueError(
                f"{name} of version {weights.version} has the shape {shape}, the model's is {shapes[name]}"
            )


def repack(modules: Iterable[Any]) -> None:
    """Pack again what computes from a packed copy and kept its weight: on a CPU the embedding and a head tied to it.

    vLLM's reload does not see that a tied head changes with the embedding, since no weight has its name.
    """
    for module in modules:
        weight = getattr(module, "weight", None)
        if hasattr(module, "cpu_linear") and isinstance(weight, Tensor) and weight.numel() > 0:
            module.quant_method.process_weights_after_loading(module)


WeightTransferEngineFactory.register_engine(BACKEND, LearnersWeights)
