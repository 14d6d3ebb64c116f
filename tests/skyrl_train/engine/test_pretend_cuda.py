"""What the engine does on CUDA, on a processor that pretends to be a GPU: right numbers, and no tensor left behind."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from skyrl_train.engine.base import Completion, Request
from skyrl_train.engine.torch.cuda_graphs import GraphedPolicy
from skyrl_train.engine.torch.sampling import sample
from skyrl_train.engine.torch.scheduler import Scheduler, Sequence
from skyrl_train.policy.model import Policy
from tests.skyrl_train.engine.conftest import ask
from tests.skyrl_train.engine.test_batched_sampling import CUTS
from tests.skyrl_train.engine.test_cuda_graphs import FAMILIES
from tests.skyrl_train.engine.test_sampling import row
from tests.skyrl_train.engine.test_torch_engine import PROMPT, assert_learner_agrees
from tests.tiny_models import tiny_policy, tiny_tokenizer

pytestmark = pytest.mark.usefixtures("pretend_cuda")


def scheduler_for(policy: Policy, *, cuda_graphs: bool) -> Scheduler:
    return Scheduler(
        policy,
        tiny_tokenizer(),
        max_num_seqs=5,
        max_num_batched_tokens=64,
        max_model_len=512,
        kv_cache_bytes=2**28,
        session_cache_bytes=2**20,
        cuda_graphs=cuda_graphs,
    )


def completions(scheduler: Scheduler, requests: list[Request]) -> list[Completion]:
    sequences = [scheduler.add(request) for request in requests]
    done: dict[Sequence, Completion] = {}
    while not scheduler.is_idle:
        done |= dict(scheduler.step())
    return [done[sequence] for sequence in sequences]


@pytest.mark.parametrize("cuda_graphs", [True, False], ids=["graphs", "plain"])
@pytest.mark.parametrize(("family", "config"), FAMILIES)
def test_logprobs_are_the_learners(family: str, config: dict[str, Any], cuda_graphs: bool) -> None:
    policy = tiny_policy(family, device="cuda", **config)
    scheduler = scheduler_for(policy, cuda_graphs=cuda_graphs)
    cut: dict[str, Any] = {"top_k": 40, "top_p": 0.9, "min_p": 0.01, "repetition_penalty": 1.1}
    requests = [
        ask(PROMPT[i:], f"{i % 7}", seed=i, min_tokens=7 * i, max_tokens=7 * i + 20, **(cut if i % 2 else {}))
        for i in range(9)
    ]
    for request, completion in zip(requests, completions(scheduler, requests), strict=True):
        assert_learner_agrees(policy, request, completion)
    model = scheduler._model
    assert isinstance(model, GraphedPolicy)
    assert (model.num_recorded > 0) == cuda_graphs


def test_new_weights_are_sampled_from() -> None:
    policy = tiny_policy(device="cuda")
    scheduler = scheduler_for(policy, cuda_graphs=True)
    completions(scheduler, [ask(PROMPT)])
    for weight in policy.module.parameters():
        weight.mul_(1.2)
    scheduler.weights_changed(1)
    [completion] = completions(scheduler, [ask(PROMPT)])
    assert completion.policy_version == 1
    assert_learner_agrees(policy, ask(PROMPT), completion)


@pytest.mark.parametrize("deterministic", [False, True])
def test_the_tokens_are_those_of_the_processor(deterministic: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: deterministic)
    logits = 3 * torch.randn(10 * len(CUTS), 1000, generator=torch.Generator().manual_seed(4))
    rows = [row(seed, tokens=(1, 2, 3), **CUTS[seed % len(CUTS)]) for seed in range(len(logits))]
    tokens, logprobs = sample(logits.to("cuda"), rows)
    assert (tokens, logprobs) == (sample(logits, rows)[0], pytest.approx(sample(logits, rows)[1], abs=1e-5))


def test_logits_that_are_not_finite_are_found_without_reading_outside_the_vocabulary() -> None:
    bad = torch.zeros(2, 1000)
    bad[1, 3] = torch.nan
    options: list[dict[str, Any]] = [{}, {"top_p": 0.5}, {"temperature": 0}]
    for params in options:
        with pytest.raises(FloatingPointError, match="diverged"):
            sample(bad.to("cuda"), [row(0, **params), row(1, **params)])


def test_the_pretended_device_tells_its_tensors_from_those_of_the_host() -> None:
    there, here = torch.zeros(3, device="cuda"), torch.ones(3)
    assert (there + 1).device.type == "cuda"
    assert (there + here.to("cuda")).tolist() == [1.0, 1.0, 1.0]
    with pytest.raises(RuntimeError, match="got tensors on cuda:0 and on the host"):
        there + here
