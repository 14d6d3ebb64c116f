"""The index follows the files, whatever happens to either, and nothing outside the given folders is read."""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import zstandard
from starlette.testclient import TestClient

from skyrl_train.batch.packing import pack
from skyrl_train.batch.samples import to_samples
from skyrl_train.run.records.advantages import advantages_path, read_advantages, write_advantages
from skyrl_train.run.records.episode import episode_record
from skyrl_train.run.records.tokens import TokenTexts
from skyrl_train.run.records.trajectories import _end
from skyrl_train.run.run_folder import rewind, run_lock
from skyrl_train.types import Turn
from skyrl_train.view import fill, index
from skyrl_train.view.app import make_app
from skyrl_train.view.columns import Columns
from skyrl_train.view.folders import RunFolder, find_runs
from skyrl_train.view.index import NAME, index_path, open_to_read, open_to_write
from skyrl_train.view.library import Entry, Library
from tests.skyrl_train.run.records.episodes import TOKENIZER, trajectory
from tests.skyrl_train.view.conftest import NUM_PROMPTS, NUM_SAMPLES, read_whole, write_run

EACH = NUM_PROMPTS * NUM_SAMPLES  # episodes of a training step


@pytest.fixture
def folder(tmp_path: Path, runs: Path) -> Path:
    """A run of two steps: 18 training episodes, six of evaluations."""
    return Path(shutil.copytree(runs / "other", tmp_path / "root/run", ignore=shutil.ignore_patterns(NAME)))


def only(library: Library) -> Entry:
    [entry] = library.entries.values()
    return entry


def files_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Read the folder, and return the names of the trajectory files that were opened for it."""
    opened: list[str] = []
    read = fill.iterate_trajectories
    monkeypatch.setattr(fill, "iterate_trajectories", lambda path: [opened.append(path.name), *read(path)][1:])
    read_whole(folder)
    monkeypatch.setattr(fill, "iterate_trajectories", read)
    return opened


def test_only_what_is_new_or_changed_is_read(folder, monkeypatch):
    assert len(files_read(folder, monkeypatch)) == 4
    assert files_read(folder, monkeypatch) == []
    path = folder / "trajectories/train_step_000002.jsonl.zst"
    os.utime(path, ns=(1, 1))
    assert files_read(folder, monkeypatch) == [path.name]
    path.unlink()
    assert only(read_whole(folder)).num_episodes == EACH + 6


def test_a_run_that_was_rewound_shows_what_is_left(folder):
    read_whole(folder)
    rewind(folder, 1)
    entry = only(read_whole(folder))
    assert (entry.num_episodes, entry.summary["step"]) == (EACH + 3, 1)
    assert not advantages_path(folder, 2).exists()
    assert advantages_path(folder, 1).exists()


@pytest.mark.parametrize("harm", ["deleted", "cut", "noise", "foreign", "trigger", "link", "folder"])
def test_an_index_that_cannot_be_trusted_is_built_anew_and_nothing_else_is_touched(folder, tmp_path, harm):
    read_whole(folder)
    path, other = folder / NAME, tmp_path / "precious"
    other.write_bytes(b"precious")
    if harm == "cut":
        path.write_bytes(path.read_bytes()[:5000])
    elif harm == "noise":
        path.write_bytes(path.read_bytes()[:4096] + b"\xff" * 40_000)
    elif harm == "trigger":
        with sqlite3.connect(path) as database:
            database.execute("CREATE TRIGGER evil AFTER INSERT ON episodes BEGIN DELETE FROM episodes; END")
    else:
        path.unlink()
    if harm == "foreign":
        with sqlite3.connect(path) as database:
            database.execute("CREATE TABLE episodes (other TEXT)")
    elif harm == "link":
        path.symlink_to(other)
    elif harm == "folder":
        path.mkdir()
    entry = only(read_whole(folder))
    assert entry.num_episodes == 2 * EACH + 6
    assert other.read_bytes() == b"precious"
    assert entry.index is not None
    with open_to_read(entry.index) as database:
        assert database.execute("SELECT count(*) FROM sqlite_master WHERE type = 'trigger'").fetchone()[0] == 0


def test_a_folder_that_cannot_be_written_has_its_index_in_the_cache(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(index, "_can_be_written", lambda _: False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    before = sorted(folder.rglob("*"))
    entry = only(read_whole(folder))
    assert entry.num_episodes == 2 * EACH + 6
    assert entry.index is not None
    assert entry.index.parent == tmp_path / "cache/skyrl-view"
    assert sorted(folder.rglob("*")) == before


def test_damaged_and_half_written_files_are_named_and_the_others_are_shown(folder):
    cut = folder / "trajectories/train_step_000001.jsonl.zst"
    cut.write_bytes(cut.read_bytes()[:-3])
    (folder / "trajectories/train_step_000009.jsonl.zst").write_bytes(b"noise")
    (folder / "trajectories/eval_step_000002.jsonl.zst.writing").write_bytes(b"half")
    (folder / "run.json").write_text("[" * 100_000)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": "x"}\n{"step": 3, "reward/avg_raw_reward": 1e999, "time": ' + "9" * 400 + '}\n{"step": 4')
    entry = only(read_whole(folder))
    assert entry.num_episodes == 2 * EACH + 6  # those of the cut file could still be read
    said = "\n".join(entry.problems)
    for name in ("train_step_000001", "is cut short", "train_step_000009", "run.json", "metrics.jsonl: line 5, 6"):
        assert name in said
    assert entry.summary["step"] == 2


@pytest.mark.parametrize("field", ["reward", "uid", "end", "turns", "segments", "messages", "seconds", "step"])
@pytest.mark.parametrize("value", [None, [], {}, "x\ud800", 10**400, float("nan"), [[1]]])
def test_an_episode_of_any_kind_is_shown_or_named(folder, field, value):
    """A folder may come from somebody else: whatever stands in a field, nothing but that file suffers."""
    record = json.loads(episode_record(trajectory(["a"], [1.0]), "train", 1, TokenTexts(TOKENIZER)).to_json())
    path = folder / "trajectories/train_step_000001.jsonl.zst"
    write_line(path, json.dumps(record | {field: value}))
    library = read_whole(folder)
    entry = only(library)
    assert entry.num_episodes + len(entry.problems) == EACH + 6 + 1
    client = TestClient(make_app(library), base_url="http://127.0.0.1")
    rows = client.get(f"/api/runs/{entry.folder.id}/episodes", params={"limit": 500}).json()["rows"]
    assert len(rows) == entry.num_episodes
    for row in [row for row in rows if row["phase"] == "train" and row["step"] == 1]:
        assert client.get(f"/api/runs/{entry.folder.id}/episodes/{row['id']}").status_code in (200, 409)


def write_line(path: Path, line: str) -> None:
    path.write_bytes(zstandard.compress(f"{line}\n".encode()) + _end(1))


def test_links_that_lead_out_of_the_folder_are_not_followed(folder, tmp_path):
    secret = tmp_path / "secret"
    write_run(secret, num_steps=1)
    for name in ("run.json", "metrics.jsonl"):
        (folder / name).unlink()
        (folder / name).symlink_to(secret / name)
    (folder / "trajectories/train_step_000007.jsonl.zst").symlink_to(
        secret / "trajectories/train_step_000001.jsonl.zst"
    )
    (folder.parent / "linked").symlink_to(secret)
    entry = only(read_whole(folder.parent))
    assert entry.summary == {} or entry.summary["step"] == 0
    assert entry.num_episodes in (0, 2 * EACH + 6)
    assert any("leads out of" in problem for problem in entry.problems)


def test_a_pipe_in_the_place_of_a_file_blocks_nothing(folder):
    (folder / "metrics.jsonl").unlink()
    os.mkfifo(folder / "metrics.jsonl")
    assert any("not a plain file" in problem for problem in only(read_whole(folder)).problems)


def test_runs_are_found_below_and_inside_each_other(tmp_path):
    for name in ("a", "a/previous/1", "b/c", "b/global_step_3/d", ".hidden", "e/trajectories/f"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "metrics.jsonl").touch()
    found = {str(run.path.relative_to(tmp_path)) for run in find_runs(tmp_path)}
    assert found == {"a", "a/previous/1", "b/c", "e"}


def test_a_run_is_running_while_its_lock_is_held(tmp_path):
    run = RunFolder(tmp_path, tmp_path)
    assert not run.is_written_now()
    if (child := os.fork()) == 0:  # a process does not see locks of its own
        try:
            with run_lock(tmp_path):
                os.close(os.open(tmp_path / "held", os.O_CREAT))
                while not (tmp_path / "seen").exists():
                    pass
        finally:
            os._exit(0)
    while not (tmp_path / "held").exists():
        pass
    assert run.is_written_now()
    (tmp_path / "seen").touch()
    os.waitpid(child, 0)
    assert not run.is_written_now()


def test_columns_follow_a_file_that_grows_is_replaced_and_goes(tmp_path):
    path, columns = tmp_path / "metrics.jsonl", Columns()
    path.write_text('{"step": 1, "a": 1.5}\n{"step": 2, "a": "NaN"}\n{"step": 3, "a": 3')
    columns.update(path)
    assert columns.series("a") == [(1, 1.5)]
    with path.open("a") as file:
        file.write('.5, "b": 1}\n{"step": 3, "b": 2}\n')
    columns.update(path)
    assert columns.series("a") == [(1, 1.5), (3, 3.5)]
    assert columns.series("b") == [(3, 2.0)]  # lines of one step are merged
    (tmp_path / "new").write_text('{"step": 1, "a": 9}\n')
    (tmp_path / "new").replace(path)
    columns.update(path)
    assert columns.series("a") == [(1, 9.0)]
    path.unlink()
    columns.update(path)
    assert columns.series("a") == []


def test_advantages_find_the_rows_of_an_edited_history_again(tmp_path):
    first = Turn([1, 2], [5, 6], [-1.0, -2.0], 0.0, "", "stop", 0)
    silent = Turn([4], [], [], 0.0, "", "stop", 0)  # a row without a sampled token, which gives no sample
    edited = Turn([1, 9], [7], [-3.0], 1.0, "", "stop", 0)
    played = replace(trajectory(["x"], [0.0]), turns=[first, silent, edited])
    samples = to_samples([played])
    batch = replace(pack(samples), advantages=torch.tensor([0.0, 0.0, 0.25, 0.25, 0.0, 0.0, -0.5]))
    write_advantages(tmp_path / "advantages", [sample.trajectory_id for sample in samples], batch)
    episode = episode_record(played, "train", 1, TokenTexts(TOKENIZER))
    rows = read_advantages(tmp_path / "advantages", episode)
    assert rows == [
        [(False, None), (False, None)], [(True, 0.25), (True, 0.25)], None, [(False, None), (False, None)],
        [(True, -0.5)],
    ]  # fmt: skip
    (tmp_path / "advantages").write_bytes(b"noise")
    with pytest.raises(ValueError, match="is damaged"):
        read_advantages(tmp_path / "advantages", episode)


def test_two_viewers_may_look_at_one_folder(folder):
    first, second = Library([folder]), Library([folder])
    while first._one_round() | second._one_round():
        pass
    assert only(first).num_episodes == only(second).num_episodes == 2 * EACH + 6
    path = index_path(folder)
    with open_to_read(path) as database:
        assert database.execute("SELECT count(*) FROM episodes").fetchone()[0] == 2 * EACH + 6
    open_to_write(path).close()
