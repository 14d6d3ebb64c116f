"""The step at which a run starts, and its treatment of files of an earlier run."""

from __future__ import annotations

import pytest

from skyrl_train.run.checkpoint import Checkpoints
from skyrl_train.run.resume import check_same_run, find_checkpoint, order_of_sums, start_run
from skyrl_train.run.run_folder import profile_steps

CONFIG = {"trainer.seed": 1, "trainer.epochs": 2}


@pytest.fixture
def run(tmp_path):
    """A run of 4 steps with checkpoints at 2 and 4, killed in step 6."""
    checkpoints = Checkpoints(tmp_path / "run")
    for step in (2, 4):
        checkpoints.save(step, {"trainer_state": {"config": CONFIG}})
    (tmp_path / "run/metrics.jsonl").write_text("".join(f'{{"step": {s}}}\n' for s in range(6)) + '{"step": 6, "re')
    (tmp_path / "run/trajectories").mkdir()
    for name in ("eval_step_000000", "train_step_000003", "train_step_000004", "train_step_000005"):
        (tmp_path / f"run/trajectories/{name}.jsonl.zst").write_bytes(b"")
    (tmp_path / "run/profile").mkdir()
    for step in (2, 4, 10):
        (tmp_path / f"run/profile/step_{step}.json.gz").write_bytes(b"")
    return checkpoints


def kept(folder):
    return sorted(p.name.removesuffix(".jsonl.zst") for p in (folder / "trajectories").iterdir())


def profiled(folder):
    return list(profile_steps(folder).values())


def test_latest_goes_on_after_the_newest_and_forgets_what_came_later(run):
    start = start_run(run, "latest", None, CONFIG)
    assert start.step == 4
    assert start.state["trainer_state"]["global_step"] == 4
    assert kept(run.folder) == ["eval_step_000000", "train_step_000003", "train_step_000004"]
    assert profiled(run.folder) == [2, 4]
    assert (run.folder / "metrics.jsonl").read_text() == "".join(f'{{"step": {s}}}\n' for s in range(5))


def test_latest_without_a_checkpoint_starts_afresh(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 0}\n{"step": 1}\n')
    (tmp_path / "global_step_3.writing").mkdir()
    assert start_run(Checkpoints(tmp_path), "latest", None, CONFIG).step == 0
    assert (tmp_path / "metrics.jsonl").read_text() == ""
    assert not (tmp_path / "global_step_3.writing").exists()


@pytest.mark.parametrize("mode", [None, "none"])
def test_none_moves_an_earlier_run_aside(run, mode):
    (run.folder / "mine.txt").write_text("not the run's")
    start = start_run(run, mode, None, {"other": 1})
    assert start.step == 0
    assert start.state == {}
    assert "was moved to" in start.notes[0]
    assert sorted(p.name for p in run.folder.iterdir()) == ["mine.txt", "previous"]
    assert (run.folder / "previous/1/global_step_4/trainer_state.safetensors").exists()
    assert len(kept(run.folder / "previous/1")) == 4
    assert profiled(run.folder / "previous/1") == [2, 4, 10]
    assert start_run(run, mode, None, CONFIG).notes == ()  # nothing left to move


def test_going_back_to_an_older_checkpoint_keeps_the_later_ones_aside(run):
    start = start_run(run, "from_path", str(run.path(2)), CONFIG)
    assert start.step == 2
    assert run.latest() == 2
    assert (run.folder / "previous/1/global_step_4").is_dir()
    assert kept(run.folder) == ["eval_step_000000"]
    assert kept(run.folder / "previous/1") == ["train_step_000003", "train_step_000004", "train_step_000005"]
    assert (profiled(run.folder), profiled(run.folder / "previous/1")) == ([2], [4, 10])
    assert '{"step": 5}' in (run.folder / "previous/1/metrics.jsonl").read_text()


def test_a_checkpoint_of_another_folder_starts_this_one(run, tmp_path):
    other = Checkpoints(tmp_path / "other")
    start = start_run(other, "from_path", str(run.path(4)), CONFIG)
    assert start.step == 4
    assert run.latest() == 4  # the other run is untouched


@pytest.mark.parametrize(
    ("mode", "path", "error", "words"),
    [
        ("from_path", None, ValueError, "needs trainer.resume_path"),
        ("from_path", "s3://bucket/global_step_2", ValueError, "s3://bucket/global_step_2 is a remote address"),
        ("from_path", "{run}/final", ValueError, "must be global_step_"),
        ("from_path", "{run}/global_step_8", FileNotFoundError, "no checkpoint folder"),
        ("newest", None, ValueError, "'newest' must be none, latest or from_path"),
    ],
)
def test_what_is_wrong_with_a_resume_is_said(run, mode, path, error, words):
    with pytest.raises(error, match=words):
        find_checkpoint(run, mode, path and path.format(run=run.folder))


def test_the_folders_name_wins_over_the_step_inside(run):
    run.path(4).rename(run.folder / "global_step_5")
    step, state = run.load(5)
    assert (step, state["trainer_state"]["global_step"]) == (5, 5)


def test_other_settings_are_refused_before_anything_is_touched(run):
    with pytest.raises(ValueError, match=r"trainer.seed: was 1, is now 2[\s\S]*resume_mode=none"):
        start_run(run, "latest", None, CONFIG | {"trainer.seed": 2})
    assert len(kept(run.folder)) == 4


def test_settings_that_may_change_are_not_compared():
    check_same_run({"a": 1, "log.level": 1, "xs": (1, 2)}, {"a": 1, "log.level": 2, "xs": [1, 2]}, {"log"})
    with pytest.raises(ValueError, match=r"logger: was '\(not set\)', is now 'x'"):
        check_same_run({}, {"logger": "x"}, {"log"})


def test_settings_that_only_change_the_order_of_sums_are_said_and_not_refused():
    keys = ("placement", "backend")
    old = {"placement.ranks": 1, "backend": "torch", "seed": 1}
    assert order_of_sums(old, old, keys) == []
    assert order_of_sums(old, old | {"seed": 2, "placement.nodes": 3}, keys) == []  # none that the old run knew
    [note] = order_of_sums(old, old | {"placement.ranks": 2, "backend": "vllm"}, keys)
    assert note.startswith("backend was 'torch', is now 'vllm'; placement.ranks was 1, is now 2: sums may now")
