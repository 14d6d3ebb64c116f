"""The learner on 2 and 3 ranks is the learner of one process: gradients, metrics, checkpoints and what it hands out."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch.distributed.fsdp import FSDPModule

from skyrl_train.algorithms import PolicyLossRegistry
from skyrl_train.config.algorithm import OffPolicyCorrectionConfig
from skyrl_train.learner.fsdp import ShardedPolicy, ShardedRanks, shard, sharded_learner
from skyrl_train.learner.learner import TorchLearner
from skyrl_train.learner.lost_gradient import GradientLost
from skyrl_train.learner.optimizer import MasterOptimizer
from skyrl_train.learner.saved import SavedLearner
from skyrl_train.ops import REFERENCE
from skyrl_train.weights.shared_memory import read_shared
from tests.skyrl_train.learner.rank_processes import RankProcesses
from tests.skyrl_train.learner.sharded_jobs import (
    Case,
    Outcome,
    batch_of,
    distance,
    hand_out,
    learner_of,
    note_gradients,
    prepared,
    resume,
    save,
    train,
)  # fmt: skip
from tests.tiny_models import tiny_policy

PLAIN: dict[str, Any] = {"use_kl_loss": False}
BFLOAT16: dict[str, Any] = {"compute_dtype": torch.bfloat16, "tie_word_embeddings": True}
LOSSES = sorted(PolicyLossRegistry.list_available())
CASES = {
    "plain": Case(PLAIN),
    "KL in the loss, of a reference that moves, and entropy": Case(
        {"kl_loss_coef": 0.1, "use_entropy_loss": True}, batches=("random", "shared"), moves_reference=True
    ),
    "KL in the reward": Case({"use_kl_loss": False, "use_kl_in_reward": True}),
    "LoRA with a reference that moves": Case(
        {"kl_loss_coef": 0.1}, lora_rank=2, batches=("random", "shared", "random"), moves_reference=True
    ),
    "several mini batches and epochs, some with fewer groups than ranks": Case(
        PLAIN,
        trainer={
            "train_batch_size": 6,
            "policy_mini_batch_size": 2,
            "update_epochs_per_batch": 2,
            "max_tokens_per_microbatch": 25,
        },
    ),
    "one sample a pass": Case(
        PLAIN, trainer={"micro_train_batch_size_per_gpu": 1, "micro_forward_batch_size_per_gpu": 1}
    ),
    "everything in one pass, a head of its own": Case(
        PLAIN, trainer={"max_tokens_per_microbatch": 10_000}, model={"tie_word_embeddings": False}
    ),
    "shared prefixes, gradient checkpointing": Case(
        PLAIN, trainer={"gradient_checkpointing": True, "max_tokens_per_microbatch": 200}, batches=("shared",) * 2
    ),
    "another family, with norms of its heads": Case(PLAIN, model={"family": "qwen3"}),
    "a family whose blocks are transformers' own": Case(PLAIN, model={"family": "olmo2"}),
    "corrected for off-policy samples": Case(
        {**PLAIN, "off_policy_correction": OffPolicyCorrectionConfig(tis_ratio_type="token")},
        trainer={"update_epochs_per_batch": 2},
    ),
    "ranks with nothing but a filtered group, or one of equal rewards": Case(PLAIN, batches=("uneven",) * 2),
    "a critic and uneven groups, some mini batches without a trained token": Case(
        {**PLAIN, "advantage_estimator": "gae", "lambd": 0.9},
        trainer={"train_batch_size": 3, "policy_mini_batch_size": 1, "critic_mini_batch_size": 1},
        batches=("uneven",),
        critic="own",
    ),
    "shards and optimizer on the host": Case(PLAIN, is_offloaded=True),
    "turns of an episode apart, a mean over episodes": Case(
        {"kl_loss_coef": 0.1, "loss_reduction": "sequence_mean"},
        trainer={"train_batch_size": 3, "policy_mini_batch_size": 1, "max_tokens_per_microbatch": 100},
        batches=("turns",),
    ),
    "a critic": Case(
        {**PLAIN, "advantage_estimator": "gae", "lambd": 0.9},
        trainer={"critic_mini_batch_size": 2},
        batches=("random", "shared"),
        critic="own",
    ),
    "a critic on the policy's hidden states": Case(
        {**PLAIN, "advantage_estimator": "gae", "lambd": 0.9},
        trainer={"critic_mini_batch_size": 2},
        batches=("random", "shared"),
        critic="shared",
    ),
    "imitation before the updates, with KL": Case({"kl_loss_coef": 0.1}, num_imitated=2),
    "imitation with adapters": Case({"kl_loss_coef": 0.1}, lora_rank=2, num_imitated=2),
    "a teacher": Case({**PLAIN, "advantage_estimator": "distillation"}, batches=("random", "shared")),
}


def ranks_of(size: int, folder: Path) -> Generator[RankProcesses]:
    processes = RankProcesses(size, folder)
    yield processes
    processes.close()


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> Generator[RankProcesses]:
    yield from ranks_of(2, tmp_path_factory.mktemp("two"))


@pytest.fixture(scope="module")
def three(tmp_path_factory) -> Generator[RankProcesses]:
    yield from ranks_of(3, tmp_path_factory.mktemp("three"))


@pytest.fixture(params=[2, 3])
def ranks(request) -> RankProcesses:
    return request.getfixturevalue({2: "two", 3: "three"}[request.param])


def assert_equal_to_one_process(outcomes: list[Outcome], expected: Outcome) -> None:
    for outcome in outcomes:
        assert outcome.metrics == outcomes[0].metrics
        assert len(outcome.gradients) == len(expected.gradients)
        assert distance(outcome.gradients[0], expected.gradients[0]) < 1e-6
        assert distance(outcome.weights, expected.weights) < 1e-5
        assert outcome.metrics == pytest.approx(expected.metrics, rel=1e-4, abs=1e-5)


@cache
def of_one_process(name: str) -> Outcome:
    return train(CASES[name], False)


@pytest.mark.parametrize("loss", LOSSES)
def test_every_loss_has_the_gradient_of_one_process(ranks, loss):
    name = f"the loss {loss}"
    CASES[name] = Case({**PLAIN, "policy_loss_type": loss}, far_from_rollout=True)
    assert_equal_to_one_process(ranks.call(train, CASES[name], True), of_one_process(name))


@pytest.mark.parametrize("name", list(CASES))
def test_every_setting_has_the_gradient_of_one_process(ranks, name):
    assert_equal_to_one_process(ranks.call(train, CASES[name], True), of_one_process(name))


IN_BFLOAT16 = {
    "whole": Case(PLAIN, model=BFLOAT16),
    "adapters": Case(PLAIN, lora_rank=2, model=BFLOAT16),
    "a critic": replace(CASES["a critic"], model=BFLOAT16),
    "a critic on the policy's hidden states": replace(CASES["a critic on the policy's hidden states"], model=BFLOAT16),
}


@cache
def in_bfloat16(name: str) -> Outcome:
    return train(IN_BFLOAT16[name], False)


@pytest.mark.parametrize("name", IN_BFLOAT16)
def test_in_bfloat16_masters_and_gradients_are_float32_and_as_near_as_rounding_lets_them(ranks, name):
    outcomes, expected = ranks.call(train, IN_BFLOAT16[name], True), in_bfloat16(name)
    assert {tensor.dtype for tensor in outcomes[0].gradients[0].values()} == {torch.float32}
    assert outcomes[0].metrics == outcomes[-1].metrics
    assert distance(outcomes[0].gradients[0], expected.gradients[0]) < 1e-2
    assert distance(outcomes[0].weights, expected.weights) < 1e-2


def gathered_off_the_grid() -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Return what `whole` and what a pass gather of masters that have left bfloat16's grid."""
    learner = learner_of(Case(PLAIN, model=BFLOAT16), is_sharded=True)
    masters = learner._optimizer.masters
    for master in masters.values():
        master.mul_(1.001)
    ranks, policy = learner._ranks, learner.policy
    whole = {name: ranks.whole(parameter) for name, parameter in policy.weights.items()}
    seen: dict[str, torch.Tensor] = {}

    def note(name: str, module: torch.nn.Module) -> None:
        seen.setdefault(f"{name}.weight", module.get_parameter("weight").detach().clone())

    for name, module in policy.module.named_modules():
        if name in ("model.norm", "model.embed_tokens", "model.layers.1.mlp.gate_proj"):
            module.register_forward_pre_hook(lambda module, _, name=name: note(name, module))
    learner.logprobs_of_tokens([1, 2, 3])
    return whole, seen


def test_a_pass_computes_with_what_one_process_would_round_the_masters_to(ranks):
    expected = {
        name: REFERENCE.rounded(weight.detach().float() * 1.001, torch.bfloat16)
        for name, weight in tiny_policy(**BFLOAT16).weights.items()
    }
    for whole, seen in ranks.call(gathered_off_the_grid):
        assert whole.keys() == expected.keys()
        assert all(torch.equal(whole[name], weight) for name, weight in expected.items())
        assert len(seen) == 3
        assert all(torch.equal(weight, expected[name]) for name, weight in seen.items())


RESUMED = {
    "whole": Case({"kl_loss_coef": 0.1}, {"scheduler": "linear"}, {"update_ref_every_epoch": True}),
    "adapters": Case({"kl_loss_coef": 0.1}, {}, {"update_ref_every_epoch": True}, lora_rank=2),
    "bfloat16": Case({"kl_loss_coef": 0.1}, {}, {"update_ref_every_epoch": True}, BFLOAT16),
}


def assert_same_files(ours: Path, theirs: Path) -> None:
    a, b = SavedLearner(ours), SavedLearner(theirs)
    assert a.shapes == b.shapes
    assert a.plain == b.plain
    assert {name.partition("/")[0] for name in a.shapes} == {"masters", "exp_avg", "exp_avg_sq", "reference"}
    for name in a.shapes:
        assert torch.equal(a.whole(name), b.whole(name)), name


@pytest.mark.parametrize("name", RESUMED)
def test_saved_by_two_it_is_read_by_one_three_and_two_bit_for_bit(two, three, name, tmp_path):
    case, saved = RESUMED[name], tmp_path / "saved"
    unbroken = two.call(save, case, saved)
    assert sorted(path.name for path in saved.iterdir()) == [
        "index.json", "rank_0_of_2.safetensors", "rank_1_of_2.safetensors"
    ]  # fmt: skip
    one = resume(case, saved, False, tmp_path / "by_1")
    by_three = three.call(resume, case, saved, True, tmp_path / "by_3")
    by_two = two.call(resume, case, saved, True, tmp_path / "by_2")
    for size in (1, 2, 3):
        assert_same_files(tmp_path / f"by_{size}", saved)
    assert by_two[0].metrics == unbroken[0].metrics
    assert all(torch.equal(by_two[0].weights[name], weight) for name, weight in unbroken[0].weights.items())
    tolerance = 1e-2 if name == "bfloat16" else 1e-5
    assert distance(one.weights, unbroken[0].weights) < tolerance
    assert distance(by_three[0].weights, unbroken[0].weights) < tolerance
    [again, _] = two.call(resume, case, tmp_path / "by_1", True)
    assert again.metrics == unbroken[0].metrics


@pytest.mark.parametrize("name", ["a critic", "a critic on the policy's hidden states"])
def test_a_critic_saved_by_two_is_read_by_one_and_three(two, three, name, tmp_path):
    case, saved = CASES[name], tmp_path / "saved"
    two.call(save, case, saved)
    resume(case, saved, False, tmp_path / "by_1")
    three.call(resume, case, saved, True, tmp_path / "by_3")
    theirs = SavedLearner(saved / "critic")
    for size in (1, 3):
        ours = SavedLearner(tmp_path / f"by_{size}" / "critic")
        assert ours.shapes == theirs.shapes
        assert ours.plain == theirs.plain
        assert all(torch.equal(ours.whole(name), theirs.whole(name)) for name in theirs.shapes)
    assert theirs.shapes["masters/value_head.weight"] == (32,)


@pytest.mark.parametrize("name", RESUMED)
@pytest.mark.parametrize("tied", [False, True])
def test_what_is_handed_out_is_what_one_process_hands_out(two, name, tied, tmp_path):
    case = replace(RESUMED[name], model={**RESUMED[name].model, "tie_word_embeddings": tied})
    two.call(save, case, tmp_path / "saved")
    handed = two.call(hand_out, case, tmp_path / "saved", tmp_path / "two", True)
    expected, logprobs = hand_out(case, tmp_path / "saved", tmp_path / "one", False)
    assert handed[0] == handed[1]
    shared, theirs = handed[0]
    assert theirs == pytest.approx(logprobs, abs=0.1 if name == "bfloat16" else 1e-4)
    assert shared.digest == expected.digest
    assert shared.tensors == expected.tensors
    assert shared.version == expected.version == 1
    assert dict(read_shared(shared)).keys() == load_file(tmp_path / "two/export/model.safetensors").keys()
    for path in sorted((tmp_path / "one/export").rglob("*")):
        other = tmp_path / "two/export" / path.relative_to(tmp_path / "one/export")
        assert path.is_dir() or path.read_bytes() == other.read_bytes(), path


def train_with_means() -> Outcome:
    """Train, and divide the ranks' sum of gradients by their number."""
    case = Case(PLAIN)
    learner = learner_of(case, is_sharded=True)
    assert isinstance(learner.policy, ShardedPolicy)
    for module in learner.policy.root.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(float(dist.get_world_size()))
    gradients, batch = note_gradients(learner), prepared(learner, case, batch_of("random"))
    learner.update(batch)
    return Outcome({}, gradients, {}, batch)


def test_a_mean_in_the_place_of_the_sum_would_be_seen(two):
    expected = of_one_process("plain")
    half = {name: gradient / 2 for name, gradient in expected.gradients[0].items()}
    [ours, _] = two.call(train_with_means)
    assert distance(ours.gradients[0], expected.gradients[0]) == pytest.approx(0.5, abs=1e-5)
    assert distance(ours.gradients[0], half) < 1e-6


def too_early(kind: str) -> str:
    """Return what is said of an optimizer that is made for weights which are not sharded, or not expected to be."""
    policy, case = tiny_policy(), Case(PLAIN)
    optimizer = case.config.policy.optimizer_config
    try:
        if kind == "before":
            MasterOptimizer(policy.module.named_parameters(), optimizer, 10, ShardedRanks(torch.float32))
        elif kind == "alone":
            TorchLearner(shard(policy), case.config, num_training_steps=10)
        else:
            reference = tiny_policy()
            config = Case({"kl_loss_coef": 0.1}).config
            learner = sharded_learner(policy, config, num_training_steps=1, temperature=1.0, reference=reference)
            assert isinstance(learner, TorchLearner)
            learner.reference = tiny_policy()
            learner.add_logprobs(batch_of("random"))
    except TypeError as error:
        return str(error)
    return ""


def test_an_optimizer_is_refused_before_its_weights_are_sharded(two):
    assert all("shard the policy before its optimizer is made" in said for said in two.call(too_early, "before"))
    assert all("this learner is of one process" in said for said in two.call(too_early, "alone"))
    assert all("the policy is not sharded" in said for said in two.call(too_early, "reference"))


def without_gradient(has_advantages: bool) -> tuple[str, float, float]:
    """Lose every gradient between the loss and the weights; return what is said, and metrics of the update."""
    case = Case(PLAIN)
    learner = learner_of(case, is_sharded=True)
    batch = prepared(learner, case, batch_of("random"))
    if not has_advantages:
        batch = replace(batch, advantages=torch.zeros(batch.num_tokens))
    forward = learner._ranks.forward(learner.policy)

    def lost(*args: Any, **settings: Any) -> tuple[torch.Tensor, torch.Tensor]:
        logprobs, entropies = forward(*args, **settings)
        return logprobs.detach() + 0.0 * logprobs, entropies

    vars(learner._ranks)["forward"] = lambda _: lost
    try:
        metrics = learner.update(batch)
    except GradientLost as error:
        return str(error), 0.0, 0.0
    return "", metrics["policy/num_steps_without_advantage"], metrics["policy/policy_version"]


def test_a_gradient_of_zero_with_advantages_is_an_error_on_every_rank(ranks):
    assert all("the gradient of all weights is exactly zero" in said for said, *_ in ranks.call(without_gradient, True))
    assert ranks.call(without_gradient, False) == [("", 1.0, 0.0)] * ranks.size


def not_finite() -> tuple[float, float, bool]:
    """Let one rank's rows of one weight have a gradient that is no number."""
    case = Case(PLAIN)
    learner = learner_of(case, is_sharded=True)
    batch = prepared(learner, case, batch_of("random"))
    before = {name: master.clone() for name, master in learner._optimizer.masters.items()}
    original = learner._optimizer._take_gradients

    def take_gradients_and_put_in_a_nan() -> None:
        original()
        if dist.get_rank() == 1:
            gradient = next(iter(learner._optimizer.masters.values())).grad
            assert gradient is not None
            gradient[0] = float("nan")

    vars(learner._optimizer)["_take_gradients"] = take_gradients_and_put_in_a_nan
    metrics = learner.update(batch)
    is_same = all(torch.equal(before[name], master) for name, master in learner._optimizer.masters.items())
    return metrics["policy/num_skipped_steps"], metrics["policy/policy_version"], is_same


def test_a_gradient_that_is_not_finite_on_one_rank_is_skipped_on_all(two):
    assert two.call(not_finite) == [(1.0, 0.0, True)] * 2


def progress(case: Case) -> list[tuple[int, int]]:
    """Return what an update tells of its progress."""
    learner, told = learner_of(case, is_sharded=True), []
    batch = prepared(learner, case, batch_of("random"))
    learner.update(batch, lambda done, total: told.append((done, total)))
    return told


def test_the_progress_counts_the_tokens_of_all_ranks(three):
    told = three.call(progress, Case(PLAIN))
    assert told[0] == told[1] == told[2]
    total = batch_of("random").num_tokens
    assert told[0][-1] == (total, total)
