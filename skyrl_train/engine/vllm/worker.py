"""vLLM's side of a weight transfer: its worker maps the file that the learner wrote and replaces every weight.

vLLM imports this module in each worker, because `SharedWeightsWorker` is its `worker_extension_cls`.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass
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
from skyrl_train.weights.shared_memory import SharedTensor, SharedWeights, read_shared

BACKEND = "skyrl_shared_memory"
# It warns at every push of layers without weights, the rotary embedding's. `check_whole` knows which really lack some.
logging.getLogger("vllm.model_executor.model_loader.reload.layerwise").setLevel(logging.ERROR)


@dataclass
class NoInfo(WeightTransferInitInfo):
    """Nothing is agreed upon beforehand: each update names its file."""


@dataclass
class SharedFile(WeightTransferUpdateInfo):
    """A SharedWeights as the message between vLLM's processes carries it: in plain types."""

    path: str
    version: int
    tensors: list[Any]
    digest: str

    @classmethod
    def of(cls, shared: SharedWeights) -> dict[str, Any]:
        tensors = [list(tensor) for tensor in shared.tensors]
        return {"path": str(shared.path), "version": shared.version, "tensors": tensors, "digest": shared.digest}

    @property
    def shared(self) -> SharedWeights:
        tensors = (SharedTensor(name, dtype, tuple(shape), first) for name, dtype, shape, first in self.tensors)
        return SharedWeights(Path(self.path), self.version, tuple(tensors), self.digest)


class SharedMemoryTransfer(WeightTransferEngine[NoInfo, SharedFile]):
    """Replaces all weights by those of one file. An update is a single chunk, and holds the whole model.

    On a GPU the model copies them from the host's memory; neither CUDA IPC nor NCCL is used.
    """

    init_info_cls, update_info_cls = NoInfo, SharedFile

    def init_transfer_engine(self, init_info: NoInfo) -> None:
        pass

    def start_weight_update(self) -> None:
        """Do nothing yet: the model is opened once the file has been checked."""

    def receive_weights(self, update_info: SharedFile) -> None:
        """Check the file, then hand its tensors to the model layer by layer."""
        shared = update_info.shared
        named = read_shared(shared)
        check_whole(shared, self._shapes())
        initialize_layerwise_reload(self.model)
        model: Any = self.model
        model.load_weights(named)

    def finish_weight_update(self) -> None:
        finalize_layerwise_reload(self.model, self.model_config)
        repack(self.model.modules())

    def shutdown(self) -> None:
        pass

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


def check_whole(shared: SharedWeights, shapes: dict[str, tuple[int, ...]]) -> None:
    """Raise ValueError unless the file has exactly the model's weights: vLLM would leave old ones in silence."""
    sent = {tensor.name: tensor.shape for tensor in shared.tensors}
    for names, says in (
        (shapes.keys() - sent.keys(), "lacks"),
        (sent.keys() - shapes.keys(), "has, unlike the model,"),
    ):
        if names:
            raise ValueError(f"version {shared.version} {says} {len(names)} weights, {min(names)} among them")
    for name, shape in sent.items():
        if shape != shapes[name]:
            raise ValueError(f"{name} of version {shared.version} has the shape {shape}, the model's is {shapes[name]}")


def repack(modules: Iterable[Any]) -> None:
    """Pack again what computes from a packed copy and kept its weight: on a CPU the embedding and a head tied to it.

    vLLM's reload does not see that a tied head changes with the embedding, since no weight has its name.
    """
    for module in modules:
        weight = getattr(module, "weight", None)
        if hasattr(module, "cpu_linear") and isinstance(weight, Tensor) and weight.numel() > 0:
            module.quant_method.process_weights_after_loading(module)


WeightTransferEngineFactory.register_engine(BACKEND, SharedMemoryTransfer)
