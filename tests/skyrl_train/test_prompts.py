"""The data set and the schedule of its prompts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from loguru import logger

from skyrl_train.prompts import DataError, PromptRows, PromptSchedule, TrainPrompts
from tests.tiny_models import tiny_tokenizer

# A ChatML prompt of one user message costs, with one token per byte and per special token:
# <|im_start|> user \n TEXT <|im_end|> \n  <|im_start|> assistant \n   =  1 + 4 + 1 + TEXT + 1 + 1 + 1 + 9 + 1
TEMPLATE_TOKENS = 19


def row(text: str, **columns: Any) -> dict[str, Any]:
    return {"prompt": [{"role": "user", "content": text}], **columns}


def write(path: Path, *rows: dict[str, Any]) -> str:
    path.write_text("".join(json.dumps(content) + "\n" for content in rows))
    return str(path)


def dataset(*sources: str, max_prompt_length: int = 100, **options: Any) -> PromptRows:
    return PromptRows(sources, tiny_tokenizer(), max_prompt_length, "default_env", **options)


def test_a_row_becomes_a_prompt_and_all_other_columns_reach_the_environment(tmp_path):
    rows = [
        row("a", env_class="mine", reward_spec={"method": "rule", "ground_truth": "4"}, data_source="math"),
        row("b", env_class=None),
    ]
    first, second = dataset(write(tmp_path / "x.jsonl", *rows))
    assert (first.uid, first.messages, first.env_class) == ("0", [{"role": "user", "content": "a"}], "mine")
    assert first.env_extras == {"reward_spec": {"method": "rule", "ground_truth": "4"}, "data_source": "math"}
    assert (second.uid, second.env_class, second.env_extras) == ("1", "default_env", {})


def test_parquet_written_by_pandas_gives_plain_python_values(tmp_path):
    frame = pd.DataFrame(
        [row("a", score=np.float32(0.5), ids=np.array([1, 2]), extra_info={"index": np.int64(3), "tags": ["t"]})]
    )
    frame.to_parquet(tmp_path / "x.parquet")
    [prompt] = dataset(str(tmp_path / "x.parquet"))
    assert prompt.env_extras == {"score": 0.5, "ids": [1, 2], "extra_info": {"index": 3, "tags": ["t"]}}
    assert type(prompt.env_extras["ids"]) is list
    assert type(prompt.env_extras["extra_info"]["index"]) is int


def test_a_text_is_one_message_and_any_column_may_hold_it(tmp_path):
    rows = [{"question": "2 + 3?", "answer": "5", "prompt": "kept out"}]
    [prompt] = dataset(write(tmp_path / "x.jsonl", *rows), prompt_column="question")
    assert prompt.messages == [{"role": "user", "content": "2 + 3?"}]
    assert prompt.env_extras == {"question": "2 + 3?", "answer": "5"}


@pytest.mark.parametrize("null", [None, float("nan")])
def test_null_means_not_given_in_every_column_that_the_trainer_reads(tmp_path, null):
    given = row("a", env_class="mine", max_turns=3, seed=7, data_source="math", hint="h")
    pd.DataFrame([given, row("b", max_turns=null, seed=null)]).to_parquet(tmp_path / "x.parquet")
    first, second = dataset(str(tmp_path / "x.parquet"))
    assert first.env_extras == {
        "max_turns": 3,
        "seed": 7,
        "data_source": "math",
        "hint": "h",
    }  # pandas made them 3.0, 7.0
    assert type(first.env_extras["seed"]) is int
    assert (second.env_class, second.data_source) == ("default_env", "unknown")
    assert second.env_extras == {"data_source": None, "hint": None}


def test_a_byte_order_mark_is_no_part_of_the_text(tmp_path):
    (tmp_path / "x.jsonl").write_bytes(b"\xef\xbb\xbf" + json.dumps(row("a")).encode())
    assert len(dataset(str(tmp_path / "x.jsonl"))) == 1


def test_columns_that_parquet_fills_up_with_null_do_not_enter_messages(tmp_path):
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "name": "bot"}]
    pd.DataFrame([{"prompt": messages}]).to_parquet(tmp_path / "x.parquet")
    [prompt] = dataset(str(tmp_path / "x.parquet"))
    assert prompt.messages == messages


def test_sources_are_joined_in_order_whatever_their_form(tmp_path):
    lines = write(tmp_path / "x.jsonl", row("a"))
    (tmp_path / "y.json").write_text(json.dumps([row("b"), row("c")], indent=2))
    pd.DataFrame([row("d")]).to_parquet(tmp_path / "z.parquet")
    prompts = dataset(lines, str(tmp_path / "y.json"), str(tmp_path / "z.parquet"))
    assert [(prompt.uid, prompt.messages[0]["content"]) for prompt in prompts] == [
        ("0", "a"), ("1", "b"), ("2", "c"), ("3", "d"),
    ]  # fmt: skip


def test_longer_prompts_are_dropped_counted_and_said(tmp_path):
    lines: list[str] = []
    sink = logger.add(lambda message: lines.append(str(message)), format="{level} {message}")
    source = write(tmp_path / "x.jsonl", row("12345"), row("123456"), row("1234"))
    prompts = dataset(source, max_prompt_length=TEMPLATE_TOKENS + 5)
    logger.remove(sink)
    assert [(prompt.uid, prompt.messages[0]["content"]) for prompt in prompts] == [("0", "12345"), ("1", "1234")]
    assert prompts.num_dropped == 1
    schedule = PromptSchedule(2, batch_size=2, epochs=1, seed=0)
    assert TrainPrompts(prompts, schedule).metrics == {"data/num_dropped_prompts": 1, "data/num_left_out_prompts": 0}
    assert lines == [f"WARNING 2 prompts from {source}, 1 dropped (longer than {TEMPLATE_TOKENS + 5} tokens)\n"]


def test_a_given_template_decides_the_length(tmp_path):
    source = write(tmp_path / "x.jsonl", row("12345"))
    template = {"chat_template": "{{ prefix }}{{ messages[0]['content'] }}", "prefix": "<<<"}
    assert len(dataset(source, max_prompt_length=8, template_kwargs=template)) == 1
    with pytest.raises(DataError, match=r"they have 8 to [0-9]+ tokens, trainer.max_prompt_length=7"):
        dataset(source, max_prompt_length=7, template_kwargs=template)


def test_a_set_without_a_usable_prompt_says_how_far_off_it_is(tmp_path):
    source = write(tmp_path / "x.jsonl", row("1" * 90), row("1" * 85))
    with pytest.raises(DataError, match=r"all 2 prompts of .* they have 104 to [0-9]+ tokens, .*max_prompt_length=100"):
        dataset(source)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ('{"question": "a"}', 'row 0 of .* has no column "prompt"; it has question'),
        ('{"prompt": 7}', "row 0 of .*: prompt must be a text, or a list of messages .* got '7'"),
        ('{"prompt": " "}', "row 0 of .*: prompt must be a text, or a list of messages .* got ' '"),
        ('{"prompt": []}', "prompt must be a text, or a list of messages"),
        ('{"prompt": [{"role": "user"}]}', "prompt must be a text, or a list of messages"),
        ('{"prompt": [{"role": "user", "content": "a"}], "env_class": 3}', "env_class must be the name .* got 3"),
        ("{oops", "is neither a JSON array nor one JSON object per line"),
        ("", "no rows in"),
        ("[1]", 'has no column "prompt"; it has a int'),
    ],
)
def test_a_row_that_is_no_prompt_is_shown(tmp_path, content, says):
    (tmp_path / "x.json").write_text(content)
    with pytest.raises(DataError, match=says):
        dataset(str(tmp_path / "x.json"))


def test_a_wrong_source_is_explained(tmp_path):
    with pytest.raises(DataError, match=r"there is no file .*gone.parquet \(given in data.train_data"):
        dataset(str(tmp_path / "gone.parquet"))
    with pytest.raises(DataError, match=r"is not a .parquet, .json, .jsonl file; name the file itself"):
        dataset(str(tmp_path))
    (tmp_path / "x.parquet").write_text("no parquet")
    with pytest.raises(DataError, match=r"is not a readable parquet file"):
        dataset(str(tmp_path / "x.parquet"))
    with pytest.raises(DataError, match=r"no rows in an empty list of sources"):
        dataset()


def test_a_name_that_is_no_file_is_asked_of_the_hub_with_its_split(monkeypatch, tmp_path):
    asked = []

    def load_dataset(name: str, split: str) -> list[dict[str, Any]]:
        asked.append((name, split))
        if split == "test":
            raise ValueError("Unknown split 'test'. Should be one of ['train'].")
        return [row("a")]

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    assert len(dataset("me/sums", "me/sums:valid")) == 2
    with pytest.raises(DataError, match=r"'me/sums:test' is no .* as a hub data set it fails: Unknown split 'test'"):
        dataset("me/sums:test")
    assert asked == [("me/sums", "train"), ("me/sums", "valid"), ("me/sums", "test")]


def test_a_template_that_refuses_the_prompt_is_named(tmp_path):
    template = {"chat_template": "{{ raise_exception('no system role') }}"}
    with pytest.raises(DataError, match=r"row 0 of .*: the chat template refuses the prompt: no system role"):
        dataset(write(tmp_path / "x.jsonl", row("a")), template_kwargs=template)


def test_a_tokenizer_without_a_template_is_refused(tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    with pytest.raises(DataError, match="has no chat template"):
        PromptRows([write(tmp_path / "x.jsonl", row("a"))], tokenizer, 100, "env")


def test_every_epoch_plays_each_prompt_once_in_an_order_of_its_own():
    schedule = PromptSchedule(12, batch_size=4, epochs=2, seed=0)
    assert (schedule.steps_per_epoch, schedule.num_steps, schedule.num_left_out) == (3, 6, 0)
    assert [schedule.epoch(step) for step in range(1, 7)] == [0, 0, 0, 1, 1, 1]
    first, second = ([row for step in steps for row in schedule.batch(step)] for steps in (range(1, 4), range(4, 7)))
    assert sorted(first) == sorted(second) == list(range(12))
    assert list(range(12)) != first != second
    assert PromptSchedule(12, batch_size=4, epochs=2, seed=1).batch(1) != schedule.batch(1)


def test_the_last_incomplete_batch_of_an_epoch_is_left_out():
    schedule = PromptSchedule(10, batch_size=4, epochs=3, seed=0)
    assert (schedule.steps_per_epoch, schedule.num_steps, schedule.num_left_out) == (2, 6, 2)
    assert [len(set(schedule.batch(step))) for step in range(1, 7)] == [4] * 6


def test_the_left_out_prompts_are_said(tmp_path):
    prompts = dataset(write(tmp_path / "x.jsonl", *[row(str(number)) for number in range(5)]))
    lines: list[str] = []
    sink = logger.add(lambda message: lines.append(str(message)), format="{message}")
    taken = TrainPrompts(prompts, PromptSchedule(5, batch_size=2, epochs=3, seed=0))
    logger.remove(sink)
    assert taken.metrics == {"data/num_dropped_prompts": 0, "data/num_left_out_prompts": 1}
    assert lines == ["6 steps of 2 prompts: 2 per epoch, which leaves out 1 of 5 prompts, others in each epoch\n"]


@pytest.mark.parametrize("done", range(7))
def test_resuming_after_any_step_needs_only_its_number(tmp_path, done):
    prompts = dataset(write(tmp_path / "x.jsonl", *[row(str(number)) for number in range(7)]))
    whole = TrainPrompts(prompts, PromptSchedule(7, batch_size=2, epochs=3, seed=5))
    unbroken = [[prompt.uid for prompt in whole.take(step)] for step in range(1, 10)]
    again = TrainPrompts(prompts, PromptSchedule(7, batch_size=2, epochs=3, seed=5))
    assert [[prompt.uid for prompt in again.take(step)] for step in range(done + 1, 10)] == unbroken[done:]


def test_the_order_is_the_same_on_every_machine():
    schedule = PromptSchedule(6, batch_size=6, epochs=2, seed=3)
    assert [schedule.batch(1), schedule.batch(2)] == [[4, 5, 2, 1, 0, 3], [2, 1, 0, 3, 5, 4]]


def test_a_line_ends_at_a_newline_only(tmp_path):
    (tmp_path / "x.jsonl").write_text(json.dumps(row("a\u2028b"), ensure_ascii=False), encoding="utf-8")
    [prompt] = dataset(str(tmp_path / "x.jsonl"))
    assert prompt.messages[0]["content"] == "a\u2028b"


def test_too_few_prompts_for_a_step_are_counted():
    with pytest.raises(
        DataError, match=r"takes trainer.train_batch_size=8 prompts, but the data set has 3; use .*=3 or"
    ):
        PromptSchedule(3, batch_size=8, epochs=1, seed=0)


def test_a_schedule_for_other_data_is_refused(tmp_path):
    prompts = dataset(write(tmp_path / "x.jsonl", row("a")))
    with pytest.raises(ValueError, match="the schedule is for 4 rows, the data set has 1"):
        TrainPrompts(prompts, PromptSchedule(4, batch_size=2, epochs=1, seed=0))


def test_steps_count_from_1_and_go_on_into_further_epochs():
    schedule = PromptSchedule(4, batch_size=2, epochs=1, seed=0)
    with pytest.raises(ValueError, match="step 0: steps count from 1"):
        schedule.batch(0)
    assert sorted(schedule.batch(3) + schedule.batch(4)) == [0, 1, 2, 3]


def test_evaluation_takes_all_prompts_in_order(tmp_path):
    prompts = dataset(write(tmp_path / "x.jsonl", *[row(str(number)) for number in range(5)]))
    assert [[prompt.uid for prompt in batch] for batch in prompts.batches(2)] == [["0", "1"], ["2", "3"], ["4"]]
