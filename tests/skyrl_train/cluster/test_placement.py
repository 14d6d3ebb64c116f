"""Which process computes on which device, as a table; and what is refused, with the arithmetic."""

from __future__ import annotations

import pytest

from skyrl_train.cluster.placement import Placement, Resources, place, refuse_missing_packages, way_of_weights
from skyrl_train.config import load_config

HERE = Resources(num_gpus=4, num_cores=8, memory_gb=32)


def ranks(number: int) -> list[str]:
    return ["trainer.strategy=fsdp2", f"trainer.placement.policy_num_gpus_per_node={number}"]


def engines(number: int) -> list[str]:
    return [f"generator.num_inference_engines={number}"]


VLLM = ["generator.backend=vllm"]
APART = ["trainer.placement.colocate_all=false"]
SPLIT = ["generator.inference_engine_tensor_parallel_size=2"]


def placed(*overrides: str, on_gpu: bool = False, here: Resources = HERE) -> Placement:
    return place(load_config(overrides), here, on_gpu=on_gpu)


@pytest.mark.parametrize(
    ("overrides", "on_gpu", "of_ranks", "of_engines", "in_process", "num_threads"),
    [
        ([], False, (0,), ((0,),), True, 8),
        ([], True, (0,), ((0,),), True, 8),
        (APART, False, (0,), ((1,),), False, 4),
        (APART, True, (0,), ((1,),), False, 4),
        (["trainer.strategy=fsdp2"], False, (0,), ((0,),), False, 8),
        (VLLM, False, (0,), ((0,),), False, 8),
        ([*ranks(2), *engines(2)], False, (0, 1), ((0,), (1,)), False, 4),
        ([*ranks(2), *engines(2), *VLLM], True, (0, 1), ((0,), (1,)), False, 4),
        ([*ranks(4), *engines(2), *VLLM, *SPLIT], True, (0, 1, 2, 3), ((0, 1), (2, 3)), False, 2),
        ([*ranks(2), *engines(1), *VLLM, *SPLIT, *APART], True, (0, 1), ((2, 3),), False, 2),
        ([*ranks(1), *engines(3), *APART], False, (0,), ((1,), (2,), (3,)), False, 2),
        ([*ranks(3), *engines(1), *APART], True, (0, 1, 2), ((3,),), False, 2),
        ([*ranks(12), *engines(12)], False, tuple(range(12)), tuple((i,) for i in range(12)), False, 1),
    ],
)
def test_ranks_and_engines_have_their_devices(overrides, on_gpu, of_ranks, of_engines, in_process, num_threads):
    placement = placed(*overrides, on_gpu=on_gpu)
    assert placement == Placement(on_gpu, in_process, of_ranks, of_engines, num_threads)


NCCL, GLOO, SHARED = ([f"generator.weight_sync_backend={name}"] for name in ("nccl", "gloo", "shared_memory"))


@pytest.mark.parametrize(
    ("overrides", "on_gpu", "way"),
    [
        (APART, True, "sent"),  # nccl is the default
        ([*APART, *NCCL, *VLLM, *SPLIT], True, "sent"),
        (VLLM, True, "ipc"),  # one GPU for both: NCCL refuses that
        ([*NCCL, *ranks(2), *engines(1), *VLLM, *SPLIT], True, "ipc"),
        ([*APART, *NCCL], False, "file"),  # on a CPU it stands for shared memory
        ([*NCCL, *VLLM], False, "file"),
        ([*ranks(2), *engines(2)], False, "file"),
        ([*APART, *GLOO], False, "sent"),
        ([*GLOO, *VLLM], False, "sent"),
        ([*GLOO, *ranks(2), *engines(2)], False, "sent"),
        ([*SHARED, *VLLM], True, "file"),
        ([*SHARED, *APART], True, "file"),
    ],
)
def test_new_weights_are_copied_on_a_device_sent_or_in_a_file_that_all_map(overrides, on_gpu, way):
    config = load_config(overrides)
    assert way_of_weights(config, place(config, HERE, on_gpu=on_gpu)) == way


def test_gloo_on_a_gpu_that_was_found_is_refused():
    with pytest.raises(ValueError, match=r"weight_sync_backend=gloo is for processes on a CPU.* use .*=nccl"):
        placed(*APART, *GLOO, on_gpu=True)


def machines(number: int, each: int) -> list[str]:
    return [*ranks(each), f"trainer.placement.policy_num_nodes={number}"]


@pytest.mark.parametrize(
    ("overrides", "on_gpu", "of_ranks", "of_engines", "used", "num_threads"),
    [
        ([*machines(2, 1), *engines(2)], False, (0, 1), (0, 1), [1, 1], 8),
        ([*machines(2, 2), *engines(4), *VLLM], True, (0, 0, 1, 1), (0, 0, 1, 1), [2, 2], 4),
        ([*machines(2, 4), *engines(4), *VLLM, *SPLIT], True, (0, 0, 0, 0, 1, 1, 1, 1), (0, 0, 1, 1), [4, 4], 2),
        ([*machines(2, 1), *engines(3), *APART], True, (0, 1), (0, 0, 1), [3, 2], 2),
        ([*machines(3, 1), *engines(1), *APART], False, (0, 1, 2), (0,), [2, 1, 1], 4),
    ],
)
def test_several_machines_have_equally_many_ranks_and_the_engines_beside_them(
    overrides, on_gpu, of_ranks, of_engines, used, num_threads
):
    placement = placed(*overrides, on_gpu=on_gpu)
    assert (placement.node_of_ranks, placement.node_of_engines) == (of_ranks, of_engines)
    assert (placement.devices_of_nodes, placement.num_threads) == (used, num_threads)
    assert f"of machine {len(used) - 1}: rank {len(of_ranks) - 1}" in str(placement)


def test_several_machines_need_a_cluster_that_is_there(monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(ValueError, match=r"policy_num_nodes=2 needs a cluster of Ray's, and RAY_ADDRESS is not set"):
        refuse_missing_packages(load_config([*machines(2, 1), *engines(2)]))
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    refuse_missing_packages(load_config([*machines(2, 1), *engines(2)]))


def test_the_sentence_for_the_log_says_who_shares_a_device():
    shared = placed(*ranks(2), *engines(2))
    assert shared.counted() == ", 2 learner ranks, 2 engines"
    assert placed().counted() == ""
    assert str(shared) == "CPU device 0: rank 0 and engine 0; CPU device 1: rank 1 and engine 1 (4 threads each)"
    apart = placed(*ranks(1), *engines(1), *VLLM, *SPLIT, *APART, on_gpu=True)
    assert apart.counted() == ", 1 learner rank, 1 engine"
    assert str(apart) == "GPU 0: rank 0; GPU 1: engine 0; GPU 2: engine 0"


@pytest.mark.parametrize(
    ("overrides", "on_gpu", "says"),
    [
        (ranks(2), False, "the policy has 2 and the engines need 1 = 1; use generator.num_inference_engines=2, or"),
        (
            [*ranks(2), *engines(3), *VLLM, *SPLIT],
            False,
            "the policy has 2 and the engines need 3 x 2 = 6; use generator.num_inference_engines=1, or "
            "trainer.placement.colocate_all=false with 2 + 6 = 8 devices",
        ),
        ([*ranks(8), *engines(8), *VLLM], True, "8 GPUs are needed (8 for the policy), and 4 are here"),
        (
            [*ranks(4), *engines(1), *VLLM, *APART],
            True,
            "5 GPUs are needed (4 for the policy + 1 for the engines), and 4 are here",
        ),
        (
            [*machines(2, 4), *engines(4), *VLLM, *APART],
            True,
            "6 GPUs are needed on each machine (4 for the policy + 2 for the engines), and 4 are on this one",
        ),
        (
            [*machines(2, 1), *engines(1), *VLLM, *SPLIT],
            True,
            "tensor_parallel_size=2 would spread an engine over machines, which have "
            "trainer.placement.policy_num_gpus_per_node=1 devices each; use a divisor of 1",
        ),
        ([*ranks(2), *engines(2)], True, "use generator.backend=vllm, or trainer.placement.colocate_all=false"),
        ([*ranks(2), *engines(2), "trainer.deterministic=true"], False, "trainer.deterministic=true needs"),
        (
            [*ranks(24), *engines(24)],
            False,
            "48 processes of at least 0.8 GB each = 38.4 GB without any weights, and this machine has 32.0 GB",
        ),
        (
            [*ranks(16), *engines(8), *VLLM, *SPLIT],
            False,
            "16 learner ranks and 8 engines are 48 processes of at least 0.8 GB each = 38.4 GB",
        ),
    ],
)
def test_what_does_not_fit_is_refused_with_the_arithmetic(overrides, on_gpu, says):
    with pytest.raises(ValueError) as caught:
        placed(*overrides, on_gpu=on_gpu)
    assert says in str(caught.value)


@pytest.mark.parametrize("overrides", [[*ranks(2), *engines(3), *APART], [*ranks(2), *engines(2)], [*VLLM], []])
def test_no_device_is_left_empty_or_out(overrides):
    placement = placed(*overrides)
    assert list(placement.sharing()) == list(range(placement.num_devices))
    names = [name for names in placement.sharing().values() for name in names]
    assert sorted(names) == sorted(
        [f"rank {i}" for i in range(len(placement.ranks))] + [f"engine {i}" for i in range(len(placement.engines))]
    )
