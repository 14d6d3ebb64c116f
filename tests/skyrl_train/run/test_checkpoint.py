"""A checkpoint exists whole or not at all, and what is wrong with one is said."""

from __future__ import annotations

import math
import multiprocessing
import random
import shutil
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import pytest
import torch
from loguru import logger

from skyrl_train.files import whole_folder
from skyrl_train.learner.ranks import ONE_PROCESS, Ranks
from skyrl_train.learner.saved import Part, write_rank
from skyrl_train.run.checkpoint import Checkpoints, random_states, set_random_states
from skyrl_train.run.digests import write_digests


def save_learner(folder: Path) -> None:
    """Write what a learner with one weight of 50 x 50 would."""
    write_rank(folder, {"masters/w": Part(torch.randn(50, 50), (50, 50))}, {"policy_version": 1}, ONE_PROCESS)


def save_two_ranks(folder: Path) -> None:
    """Write what two ranks with 25 rows each would."""
    for number in range(2):
        ranks = Ranks()
        ranks.rank, ranks.size = number, 2
        write_rank(folder, {"masters/w": Part(torch.randn(25, 50), (50, 50))}, {"policy_version": 1}, ranks)


def state(step: int) -> dict:
    return {
        "trainer_state": {"config": {"trainer.seed": 1}, "random": random_states()},
        "data": {"position": step * 4},
        "model": {"w": torch.full((3,), float(step))},
    }


@pytest.fixture
def logged() -> Iterator[list[str]]:
    """Warnings, as they come."""
    lines: list[str] = []
    sink = logger.add(lambda message: lines.append(str(message)), level="WARNING")
    yield lines
    logger.remove(sink)


def test_a_saved_state_comes_back_as_it_was(tmp_path):
    Checkpoints(tmp_path).save(7, state(7))
    step, loaded = Checkpoints(tmp_path).load(7)
    assert step == 7
    assert loaded["trainer_state"]["global_step"] == 7
    assert loaded["trainer_state"]["config"] == {"trainer.seed": 1}
    assert loaded["data"] == {"position": 28}
    assert loaded["model"]["w"].tolist() == [7.0, 7.0, 7.0]
    assert (tmp_path / "latest_ckpt_global_step.txt").read_text() == "7"


def test_a_step_that_is_already_saved_is_not_written_again(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(3, state(3))
    checkpoints.save(3, state(3) | {"data": {"position": -1}})
    assert checkpoints.load(3)[1]["data"] == {"position": 12}
    assert [p.name for p in tmp_path.glob("global_step_*")] == ["global_step_3"]


def test_only_the_newest_are_kept(tmp_path):
    checkpoints = Checkpoints(tmp_path, max_to_keep=2)
    for step in (9, 10, 11):  # by number, not by name: "9" sorts behind "10"
        checkpoints.save(step, state(step))
    assert sorted(p.name for p in tmp_path.glob("global_step_*")) == ["global_step_10", "global_step_11"]
    with pytest.raises(ValueError, match="max_ckpts_to_keep=0"):
        Checkpoints(tmp_path, max_to_keep=0)


def test_objects_are_refused_with_the_path_to_them(tmp_path):
    bad = {"trainer_state": {"config": {"trainer.ckpt_path": Path("x")}}}
    with pytest.raises(TypeError, match=r"trainer_state\['config'\]\['trainer.ckpt_path'\] is a PosixPath"):
        Checkpoints(tmp_path).save(1, bad)
    assert list(tmp_path.iterdir()) == []  # the half-written folder is gone


def test_every_kind_of_plain_data_comes_back_as_it_was(tmp_path):
    value = {
        "tuple": (1, [2.5, None], {"x": (True,)}),
        "integer keys": {0: {"step": torch.tensor(3.0)}, 1: {}},
        "$tensor": "a key like one of ours",
        "numbers": [0.1, -0.0, 1e-300, float("inf"), 2**80],
        "text": "☃ \n\x00 \ud800",
    }
    Checkpoints(tmp_path).save(1, {"trainer_state": value})
    loaded = Checkpoints(tmp_path).load(1)[1]["trainer_state"]
    assert repr(loaded) == repr({"global_step": 1, **value})
    assert math.copysign(1, loaded["numbers"][1]) == -1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.uint8, torch.bool])
def test_tensors_of_any_type_and_layout_come_back_bit_for_bit(tmp_path, dtype):
    whole = (torch.randn(6, 4) * 3).to(dtype)
    tensors = {
        "whole": whole,
        "same": whole,
        "part": whole[2:],
        "turned": whole.T,
        "empty": whole[:0],
        "one": whole[0, 0],
    }
    Checkpoints(tmp_path).save(1, {"trainer_state": {}, "tensors": tensors})
    loaded = Checkpoints(tmp_path).load(1)[1]["tensors"]
    for name, tensor in tensors.items():
        assert loaded[name].dtype == dtype
        assert torch.equal(loaded[name], tensor)
    loaded["whole"].zero_()  # what is loaded is the caller's own: no tensor and no file shares its memory
    assert torch.equal(loaded["same"], whole)
    assert torch.equal(Checkpoints(tmp_path).load(1)[1]["tensors"]["whole"], whole)


def test_the_newest_checkpoint_wins_over_the_text_file_which_is_said(tmp_path, logged):
    checkpoints = Checkpoints(tmp_path)
    assert checkpoints.latest() is None
    for step in (2, 4):
        checkpoints.save(step, state(step))
    (tmp_path / "global_step_9").mkdir()  # nothing in it: made by hand, or for an export
    assert checkpoints.latest() == 4
    assert logged == []
    for hint in (b"2", b"9", b"", b"4\xb4", b"\x00\xff", "²".encode(), b"-4", b"t"):
        (tmp_path / "latest_ckpt_global_step.txt").write_bytes(hint)
        logged.clear()
        assert checkpoints.latest() == 4
        assert "latest_ckpt_global_step.txt says" in logged[0]


def test_a_checkpoint_of_ranks_that_do_not_share_the_folder_is_no_checkpoint(tmp_path):
    def save_rank_0_alone(folder: Path) -> None:
        ranks = Ranks()
        ranks.size = 2  # the other one has written its file on another machine
        write_rank(folder, {"masters/w": Part(torch.randn(25, 50), (50, 50))}, {}, ranks)

    with pytest.raises(FileNotFoundError, match=r"rank_1_of_2.safetensors is missing.*trainer.ckpt_path to a folder"):
        Checkpoints(tmp_path).save(1, state(1), save_rank_0_alone)
    assert list(tmp_path.iterdir()) == []


def flipped(path: Path, bit: int) -> bytes:
    content = bytearray(path.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    return bytes(content)


@pytest.mark.parametrize(
    ("save", "names"),
    [
        (save_learner, ["policy/rank_0_of_1.safetensors"]),
        (save_two_ranks, ["policy/rank_0_of_2.safetensors", "policy/rank_1_of_2.safetensors"]),
    ],
)
def test_no_flipped_bit_in_any_file_loads(tmp_path, save, names):
    checkpoints = Checkpoints(tmp_path)
    folder = checkpoints.save(1, state(1), save)
    rng = random.Random(0)
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    assert [path.relative_to(folder).as_posix() for path in files] == [
        "data.safetensors", "digests.txt",
        "model.safetensors", "policy/index.json", *names, "trainer_state.safetensors",
    ]  # fmt: skip
    for path in files:
        whole = path.read_bytes()
        for bit in rng.sample(range(8 * len(whole)), k=200):
            path.write_bytes(flipped(path, bit))
            with pytest.raises(ValueError, match=r"No earlier checkpoint"):
                checkpoints.load(1)
            path.write_bytes(whole)
    checkpoints.load(1)


@pytest.mark.parametrize("share", [0, 0.01, 0.5, 0.999])
@pytest.mark.parametrize("name", ["trainer_state.safetensors", "model.safetensors", "digests.txt"])
def test_a_file_cut_anywhere_is_named_and_the_checkpoint_before_it_offered(tmp_path, name, share):
    checkpoints = Checkpoints(tmp_path)
    for step in (1, 2, 3):
        checkpoints.save(step, state(step))
    for step in (2, 3):
        file = checkpoints.path(step) / name
        file.write_bytes(file.read_bytes()[: int(share * file.stat().st_size)])
    with pytest.raises(ValueError, match=rf"global_step_3/{name} .*global_step_1 before it is whole") as caught:
        checkpoints.load(checkpoints.latest() or 0)
    assert f"trainer.resume_mode=from_path trainer.resume_path={checkpoints.path(1)} " in str(caught.value)


def rewritten_digests(folder: Path, change: Callable[[str], str]) -> None:
    (folder / "digests.txt").write_text(change((folder / "digests.txt").read_text()))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda f: (f / "trainer_state.safetensors").unlink(), r"trainer_state\.safetensors is missing"),
        (lambda f: (f / "model.safetensors").unlink(), r"model\.safetensors is missing"),
        (lambda f: (f / "digests.txt").unlink(), r"digests\.txt is missing"),
        (lambda f: (f / "digests.txt").write_bytes(b"\xff\xfe"), r"digests\.txt is damaged"),
        (lambda f: (f / "data.safetensors").rename(f / "moved"), r"data\.safetensors is missing"),
        (
            lambda f: rewritten_digests(f, lambda text: "".join(text.splitlines(keepends=True)[:-1])),
            r"trainer_state\.safetensors is not listed in digests\.txt",
        ),
        (
            lambda f: rewritten_digests(f, lambda text: text.replace("format 3", "format 4")),
            r"global_step_1 has format 4, of a later version of this program; this one reads format 3",
        ),
        (
            lambda f: rewritten_digests(f, lambda text: text.replace("format 3", "format 2")),
            r"global_step_1 has format 2, of an earlier version of this program; this one reads format 3",
        ),
        (
            lambda f: [(f / "digests.txt").unlink(), (f / "trainer_state.pt").touch()],
            r"global_step_1 has format 1, of an earlier version",
        ),
        (
            lambda f: shutil.copy(f / "model.safetensors", f / "data.safetensors"),
            r"data\.safetensors is damaged or cut short",
        ),
    ],
)
def test_whatever_is_wrong_with_a_file_is_said_with_its_name(tmp_path, damage, words):
    checkpoints = Checkpoints(tmp_path)
    damage(checkpoints.save(1, state(1)))
    assert checkpoints.latest() == 1  # and not silently an earlier one
    with pytest.raises(ValueError, match=words):
        checkpoints.load(1)


def test_a_file_with_right_digest_that_is_no_part_of_a_checkpoint_runs_no_code(tmp_path):
    class Evil:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "owned",))

    checkpoints = Checkpoints(tmp_path)
    folder = checkpoints.save(1, state(1))
    torch.save(Evil(), folder / "data.safetensors")
    header = (folder / "digests.txt").read_text().partition("\n")[0]
    (folder / "digests.txt").unlink()
    write_digests(folder, header)
    with pytest.raises(ValueError, match=r"data\.safetensors is not a part of a checkpoint"):
        checkpoints.load(1)
    assert not (tmp_path / "owned").exists()


def test_random_states_continue_where_they_were(tmp_path):
    Checkpoints(tmp_path).save(1, {"trainer_state": {"random": random_states()}})
    first = (random.random(), np.random.rand(), torch.rand(()).item(), np.random.randn())
    set_random_states(Checkpoints(tmp_path).load(1)[1]["trainer_state"]["random"])
    assert (random.random(), np.random.rand(), torch.rand(()).item(), np.random.randn()) == first


def test_an_error_while_writing_leaves_the_old_folder(tmp_path):
    with whole_folder(tmp_path / "a") as folder:
        (folder / "x").write_text("old")
    with pytest.raises(OSError, match="disk full"), whole_folder(tmp_path / "a") as folder:
        raise OSError("disk full")
    assert (tmp_path / "a" / "x").read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def save_forever(folder: str, progress: Connection) -> None:
    checkpoints = Checkpoints(folder, max_to_keep=2)
    checkpoints.remove_leftovers()
    step = (checkpoints.latest() or 0) + 1
    while True:
        weights = {f"w{i}": torch.full((20_000,), float(step)) for i in range(4)}
        checkpoints.save(step, {"trainer_state": {}, "model": weights, "optimizer": weights})
        progress.send(step)
        step += 1


def test_kill_9_in_the_middle_of_saves_always_leaves_a_loadable_newest_checkpoint(tmp_path):
    rng = random.Random(0)
    processes = multiprocessing.get_context("forkserver")  # see conftest.py: torch is imported once
    checkpoints = Checkpoints(tmp_path, max_to_keep=2)
    for _ in range(8):
        ours, theirs = processes.Pipe(duplex=False)
        saver = processes.Process(target=save_forever, args=(str(tmp_path), theirs))
        saver.start()
        theirs.close()
        done = ours.recv()
        time.sleep(rng.uniform(0, 0.1))
        saver.kill()
        saver.join()
        while ours.poll():
            try:
                done = ours.recv()
            except EOFError:
                break
        newest = checkpoints.latest() or 0
        assert newest >= done  # everything that save() returned for is there
        _, loaded = checkpoints.load(newest)
        for part in ("model", "optimizer"):
            assert all(torch.equal(w, torch.full((20_000,), float(newest))) for w in loaded[part].values())
    checkpoints.remove_leftovers()
    names = {p.name for p in tmp_path.iterdir()} - {"latest_ckpt_global_step.txt"}
    assert names <= {f"global_step_{s}" for s in range(newest - 2, newest + 1)}


def test_files_of_ranks_that_were_swapped_or_lost_are_named(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    learner = checkpoints.save(1, state(1), save_two_ranks) / "policy"
    first, second = learner / "rank_0_of_2.safetensors", learner / "rank_1_of_2.safetensors"
    contents = first.read_bytes(), second.read_bytes()
    first.write_bytes(contents[1])
    second.write_bytes(contents[0])
    with pytest.raises(ValueError, match=r"rank_0_of_2\.safetensors is damaged"):
        checkpoints.load(1)
    first.write_bytes(contents[0])
    second.unlink()
    with pytest.raises(ValueError, match=r"rank_1_of_2\.safetensors is missing"):
        checkpoints.load(1)
