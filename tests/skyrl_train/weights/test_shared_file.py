import multiprocessing
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from skyrl_train.weights.shared_memory import SharedWeights, read_shared, write_shared
from tests.tiny_models import tiny_module

NAMED = {
    "rows": torch.arange(15, dtype=torch.float32).view(3, 5).bfloat16(),
    "one": torch.tensor(2.5),
    "turned": torch.arange(6, dtype=torch.float16).view(2, 3).t(),  # not contiguous
    "none": torch.empty(0, 4),
    "double": torch.tensor([1.0, -0.0, float("nan")], dtype=torch.float64),
    "ids": torch.tensor([7, -1]),
    "mask": torch.tensor([True, False, True]),
}


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def test_every_type_and_shape_comes_back_bit_for_bit_and_in_order(tmp_path):
    shared = write_shared(NAMED.items(), tmp_path / "weights", version=3)
    read = dict(read_shared(shared))
    assert list(read) == list(NAMED)
    for name, tensor in NAMED.items():
        assert (read[name].dtype, read[name].shape) == (tensor.dtype, tensor.shape)
        assert torch.equal(bits(read[name]), bits(tensor))
    assert shared.version == 3
    assert shared.num_bytes == os.stat(shared.path).st_size


def test_tensors_begin_at_multiples_of_64_bytes(tmp_path):
    shared = write_shared(NAMED.items(), tmp_path / "weights", version=0)
    # 30 bytes, then 4, then 12: each in its own 64
    assert [tensor.first_byte for tensor in shared.tensors][:4] == [0, 64, 128, 192]


@pytest.mark.parametrize("tied", [True, False])
def test_a_tied_head_is_written_once(tmp_path, tied):
    module = tiny_module("llama", tie_word_embeddings=tied)
    shared = write_shared(module.named_parameters(), tmp_path / "weights", version=0)
    assert ("lm_head.weight" in {tensor.name for tensor in shared.tensors}) is not tied


def test_a_tensor_is_asked_for_only_when_the_one_before_is_written(tmp_path):
    written: list[int] = []

    def gathered():
        for number in range(3):
            written.append(os.stat(tmp_path / "weights").st_size)
            yield str(number), torch.ones(16)

    write_shared(gathered(), tmp_path / "weights", version=0)
    assert written == [0, 64, 128]


def send(shared: SharedWeights, queue) -> None:
    queue.put({name: tensor.sum().item() for name, tensor in read_shared(shared)})


def test_another_process_reads_it(tmp_path):
    shared = write_shared([("a", torch.ones(3)), ("b", torch.full((2,), 5.0).bfloat16())], tmp_path / "w", version=1)
    context = multiprocessing.get_context("forkserver")
    queue = context.Queue()
    process = context.Process(target=send, args=(shared, queue))
    process.start()
    assert queue.get(timeout=60) == {"a": 3.0, "b": 10.0}
    process.join(10)


def test_memory_without_a_name_is_a_file_as_well():
    """It goes with the last process that has it open, however that ends."""
    descriptor = os.memfd_create("weights")
    shared = write_shared([("a", torch.ones(3))], Path(f"/proc/{os.getpid()}/fd/{descriptor}"), version=0)
    [(name, tensor)] = read_shared(shared)
    os.close(descriptor)
    assert (name, tensor.tolist()) == ("a", [1.0, 1.0, 1.0])
    with pytest.raises(OSError, match="No such file"):
        read_shared(shared)


def test_mapped_tensors_outlive_the_file_and_a_write_to_them_stays_here(tmp_path):
    shared = write_shared([("a", torch.ones(3))], tmp_path / "weights", version=0)
    [(_, first)], [(_, second)] = read_shared(shared), read_shared(shared)
    first.zero_()
    shared.path.unlink()
    assert second.tolist() == [1.0, 1.0, 1.0]


def test_a_cut_file_is_refused_before_anything_is_read(tmp_path):
    shared = write_shared(NAMED.items(), tmp_path / "weights", version=0)
    os.truncate(shared.path, shared.num_bytes - 1)
    with pytest.raises(ValueError, match=r"weights has \d+ bytes, and \d+ were written"):
        read_shared(shared)
    assert os.stat(shared.path).st_size == shared.num_bytes - 1  # mapping it did not make it longer


def test_other_bytes_of_the_same_size_are_refused(tmp_path):
    shared = write_shared([("a", torch.ones(64))], tmp_path / "weights", version=4)
    write_shared([("a", torch.ones(64).index_fill(0, torch.tensor(40), 2.0))], tmp_path / "weights", version=5)
    with pytest.raises(ValueError, match="does not hold the weights of version 4: its digest differs"):
        read_shared(shared)
    with pytest.raises(ValueError, match="digest"):
        read_shared(replace(shared, digest="0" * 32))


def test_an_older_file_of_that_name_is_replaced(tmp_path):
    path = tmp_path / "weights"
    path.write_bytes(b"left by a process that was killed" * 1000)
    [(_, tensor)] = read_shared(write_shared([("a", torch.ones(3))], path, version=0))
    assert tensor.tolist() == [1.0, 1.0, 1.0]


def broken():
    yield "a", torch.ones(3)
    raise MemoryError("no memory for the next weight")


@pytest.mark.parametrize(
    ("named", "error"),
    [
        (broken(), "no memory for the next weight"),
        ([], "a file without weights"),
        ([("a", torch.ones(1)), ("b", torch.ones(1)), ("a", torch.ones(1))], "the weight a comes 2 times"),
    ],
)
def test_a_write_that_fails_leaves_no_file(tmp_path, named, error):
    with pytest.raises((MemoryError, ValueError), match=error):
        write_shared(named, tmp_path / "weights", version=0)
    assert list(tmp_path.iterdir()) == []


def test_nobody_else_may_read_the_file(tmp_path):
    shared = write_shared([("a", torch.ones(3))], tmp_path / "weights", version=0)
    assert os.stat(shared.path).st_mode & 0o777 == 0o600
