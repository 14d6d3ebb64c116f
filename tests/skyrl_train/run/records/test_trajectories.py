"""Every episode is kept, once, and can be read back."""

from __future__ import annotations

import dataclasses
import random

import numpy as np
import pandas
import pytest
from rich.console import Console

from skyrl_train.records.__main__ import main
from skyrl_train.run.metrics import num_response_tokens
from skyrl_train.run.records.episode import segments
from skyrl_train.run.records.report import write_report
from skyrl_train.run.records.show import show
from skyrl_train.run.records.tokens import TokenTexts
from skyrl_train.run.records.trajectories import TrajectoryStore, read_trajectories, trajectory_files
from skyrl_train.types import EpisodeEnd, Turn
from tests.skyrl_train.run.records.episodes import TOKENIZER, ids, prompt, trajectory


@pytest.fixture
def store(tmp_path):
    store = TrajectoryStore(tmp_path, TOKENIZER)
    yield store
    store.close()


def test_an_episode_comes_back_with_everything(store, tmp_path):
    kept = trajectory(
        ["yo", "hi"],
        [0.0, 1.0],
        of=dataclasses.replace(prompt("7", "echo"), env_extras={"data_source": "echo", "gold": np.int64(4)}),
        env_metrics={"exact": True},
        num_attempts=2,
        failure="server died",
        seconds=1.5,
    )
    store.add("train", 1, [kept])
    store.flush()
    (read,) = read_trajectories(tmp_path / "trajectories/train_step_000001.jsonl.zst")
    assert (read.phase, read.step, read.uid, read.data_source, read.seed) == ("train", 1, "7", "echo", 11)
    assert (read.reward, read.end, read.num_attempts, read.failure) == (1.0, EpisodeEnd.FINISHED, 2, "server died")
    assert read.env_extras == {"data_source": "echo", "gold": 4}
    assert read.env_metrics == {"exact": True}
    assert [(t.reward, t.text, t.policy_version) for t in read.turns] == [(0.0, "yo", 3), (1.0, "hi", 3)]
    assert read.turns[0].observation == [{"role": "user", "content": "[no]>"}]
    assert [(s.sampled, s.text) for s in read.segments] == [
        (False, "say hi>"), (True, "yo"), (False, "[no]>"), (True, "hi"),
    ]  # fmt: skip
    assert read.segments[1].logprobs == [-0.5, -0.5]
    assert read.segments[3].ids == ids("hi")


def test_an_edited_history_opens_a_new_row(store):
    first = Turn([1, 2], [5, 6], [-1.0, -1.0], 0.0, "", "stop", 0)
    edited = Turn([1, 9], [7], [-1.0], 1.0, "", "stop", 0)
    episode = dataclasses.replace(trajectory(["x"], [0.0]), turns=[first, edited])
    rows = [(s.new_history, s.sampled, s.ids) for s in segments(episode, store.token_texts)]
    assert rows == [(True, False, [1, 2]), (False, True, [5, 6]), (True, False, [1, 9]), (False, True, [7])]
    assert num_response_tokens(episode) == 3


def test_calls_of_one_step_add_up_and_a_new_process_replaces_the_step(store, tmp_path):
    path = tmp_path / "trajectories/train_step_000002.jsonl.zst"
    store.add("train", 2, [trajectory(["a"], [0.0])])
    store.add("train", 2, [trajectory(["b"], [0.0])])
    store.flush()
    assert [e.turns[0].text for e in read_trajectories(path)] == ["a", "b"]
    resumed = TrajectoryStore(tmp_path, TOKENIZER)
    resumed.add("train", 2, [trajectory(["c"], [0.0])])
    resumed.close()
    assert [e.turns[0].text for e in read_trajectories(path)] == ["c"]
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_a_failed_write_is_raised_and_not_lost(tmp_path):
    (tmp_path / "trajectories").write_text("a file where the folder should be")
    store = TrajectoryStore(tmp_path, TOKENIZER)
    store.add("eval", 0, [trajectory(["a"], [0.0])])
    with pytest.raises(OSError):
        store.close()


def test_characters_of_several_tokens_stand_at_their_last_token():
    texts = TokenTexts(TOKENIZER)
    assert texts(ids("é!")) == ["", "é", "!"]
    assert texts(ids("😀")) == ["", "", "", "😀"]
    assert texts(ids("é")[:1]) == ["\ufffd"]  # never completed
    assert texts([TOKENIZER.eos_token_id]) == ["<|im_end|>"]
    odd = "a\x00\x1b[31m\u2028 ünï <script>\n"
    assert "".join(texts(ids(odd))) == odd


def test_a_file_cut_anywhere_is_named_and_never_read_as_a_shorter_one(store, tmp_path, capsys):
    sizes = []
    for text in "abc":
        store.add("train", 1, [trajectory([text], [0.0])])
        store.flush()
        (path,) = trajectory_files(tmp_path).values()
        sizes.append(path.stat().st_size)
    whole = path.read_bytes()
    assert main(["show", str(tmp_path)]) == 0
    assert "3 episodes" in capsys.readouterr().out
    frame_ends = [0, *(size - 16 for size in sizes), sizes[-1] - 16]
    for length in (*frame_ends, *range(1, len(whole), 13), len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"train_step_000001\S+ is (cut short|damaged)"):
            read_trajectories(path)
    assert main(["show", str(tmp_path)]) == 1
    assert "train_step_000001.jsonl.zst is cut short" in capsys.readouterr().err


def test_a_flipped_bit_is_named_or_changes_nothing(store, tmp_path):
    store.add("train", 1, [trajectory(["a"], [0.0]), trajectory(["b"], [1.0])])
    store.flush()
    (path,) = trajectory_files(tmp_path).values()
    whole, episodes = path.read_bytes(), read_trajectories(path)
    harmless = 0  # the format leaves some bits free
    for bit in random.Random(0).sample(range(8 * len(whole)), k=200):
        content = bytearray(whole)
        content[bit // 8] ^= 1 << bit % 8
        path.write_bytes(content)
        try:
            read = read_trajectories(path)
        except ValueError:
            continue
        assert read == episodes
        harmless += 1
    assert harmless < 20


def test_the_report_is_written_without_what_a_damaged_file_held(store, tmp_path):
    for step in (1, 2):
        store.add("train", step, [trajectory([f"reply of step {step}"], [0.0])])
    store.flush()
    path = trajectory_files(tmp_path)[2]
    path.write_bytes(path.read_bytes()[:-1])
    page = write_report(tmp_path).read_text()
    assert "train_step_000002.jsonl.zst is cut short" in page
    assert "Early: step 1" in page


def test_the_files_can_be_read_by_other_programs(store, tmp_path):
    store.add("train", 1, [trajectory(["a"], [0.0]), trajectory(["b"], [1.0])])
    store.add("train", 1, [trajectory(["c"], [0.5])])
    store.flush()
    (path,) = trajectory_files(tmp_path).values()
    assert pandas.read_json(path, lines=True, compression="zstd").reward.tolist() == [0.0, 1.0, 0.5]


def test_show_prints_the_best_first_and_no_control_characters(store, tmp_path, capsys):
    store.add("train", 1, [trajectory(["bad\x1b[2J"], [0.0]), trajectory(["good"], [1.0])])
    store.add("train", 2, [trajectory(["later"], [0.5])])
    store.flush()
    console = Console(width=100, highlight=False, markup=False)
    show(tmp_path, "train", 1, "best", 1, console)
    printed = capsys.readouterr().out
    assert "train step 1: 2 episodes, mean reward 0.500" in printed
    assert "good" in printed
    assert "bad" not in printed
    assert main(["show", str(tmp_path), "--step", "1", "--worst", "1"]) == 0
    printed = capsys.readouterr().out
    assert "bad\u241b[2J" in printed
    assert "\x1b" not in printed
    assert main(["show", str(tmp_path)]) == 0
    assert "later" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [(["--step", "9"], "there are steps 1-2, 5"), (["--eval"], "holds no eval trajectories")],
)
def test_show_says_what_there_is(store, tmp_path, capsys, arguments, words):
    for step in (1, 2, 5):
        store.add("train", step, [trajectory(["a"], [0.0])])
    store.flush()
    assert main(["show", str(tmp_path), *arguments]) == 1
    assert words in capsys.readouterr().err
