"""Data sets that a user's get_train_dataset returns: SkyRL's class, or one of the user's own as Harbor has it."""

from __future__ import annotations

import json
from typing import Any

import pytest

from skyrl_train.config import load_config
from skyrl_train.dataset import PromptDataset
from skyrl_train.engine.base import SamplingParams
from skyrl_train.entrypoints.main_base import BasePPOExp
from skyrl_train.generators.custom_generator import _input_of
from skyrl_train.given_prompts import given_prompts
from skyrl_train.prompts import DataError
from skyrl_train.rollout.round import Round
from skyrl_train.types import Prompt
from tests.tiny_models import save_tiny_model, tiny_tokenizer

HI = [{"role": "user", "content": "hi"}]


class Tasks:
    """Items as dictionaries; a prompt is the path of a task."""

    def __init__(self, items: list[Any]) -> None:
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Any:
        return self.items[index]

    def collate_fn(self, items: list[Any]) -> list[Any]:
        return items


def task(path: str, **changes: Any) -> dict[str, Any]:
    return {"prompt": path, "env_class": None, "env_extras": {"data_source": path}, "uid": path, **changes}


def test_skyrls_data_set_is_made_and_read_as_skyrls(tmp_path):
    rows = [{"prompt": HI, "env_class": "gsm8k", "x": 1}, {"prompt": HI}, {"prompt": [{**HI[0], "content": "h" * 99}]}]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    dataset = PromptDataset([str(file)], tiny_tokenizer(), 64, num_workers=8)
    assert [dataset[i] for i in range(len(dataset))] == [(HI, "gsm8k", {"x": 1}, "0"), (HI, None, {}, "1")]
    assert dataset.collate_fn([dataset[0]]) == [
        {"prompt": HI, "env_class": "gsm8k", "env_extras": {"x": 1}, "uid": "0"}
    ]
    assert dataset.dataframe["prompt"][1] == HI
    made = given_prompts(dataset, "get_train_dataset", "echo")
    assert made is not None
    assert [(p.uid, p.messages, p.env_class, p.env_extras) for p in made] == [
        ("0", HI, "gsm8k", {"x": 1}),
        ("1", HI, "echo", {}),
    ]


def test_a_prompt_that_is_no_conversation_reaches_the_generator_as_it_is():
    made = given_prompts(Tasks([task("/a"), task("/b")]), "get_train_dataset", "gsm8k")
    assert made is not None
    assert [prompt.uid for prompt in made] == ["/a", "/b"]
    given = _input_of(Round("train", 1, list(made), 2, SamplingParams(max_tokens=9)))
    assert given["prompts"] == ["/a", "/a", "/b", "/b"]
    assert given["env_extras"] == [{"data_source": path} for path in ("/a", "/a", "/b", "/b")]


@pytest.mark.parametrize(
    "item",
    [
        Prompt("0", HI, "gsm8k", {"x": 1}),
        (HI, "gsm8k", {"x": 1}, "0"),
        {"prompt": HI, "env_class": "gsm8k", "env_extras": {"x": 1}, "uid": 0},
        {"prompt": HI, "env_class": "gsm8k", "x": 1},
    ],
)
def test_every_form_of_an_item_is_the_same_prompt(item):
    made = given_prompts([item], "get_train_dataset", "other")
    assert made is not None
    [prompt] = made
    assert (prompt.uid, prompt.messages, prompt.env_class, prompt.env_extras) == ("0", HI, "gsm8k", {"x": 1})


@pytest.mark.parametrize(
    ("dataset", "says"),
    [
        (3, "get_train_dataset returned int; it must return a PromptDataset"),
        ([], "get_train_dataset returned a list without any items"),
        ([3], "item 0 of get_train_dataset is a int; it must be a dictionary with prompt, env_class"),
        ([task("/a"), task("/a")], "1 items have the uid of another one"),
        ([{"env_class": "gsm8k"}], "item 0 of get_train_dataset: prompt must be a text, or a list of messages"),
    ],
)
def test_what_is_no_data_set_is_refused(dataset, says):
    with pytest.raises(DataError, match=says):
        given_prompts(dataset, "get_train_dataset", "gsm8k")


def test_rows_that_a_generator_of_ones_own_plays_need_no_environment(tmp_path):
    save_tiny_model(tmp_path / "model")
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps({"prompt": HI, "env_class": "will/wordle"}) + "\n")
    config = load_config(
        [
            f"data.train_data=['{file}']", "data.val_data=[]", f"trainer.policy.model.path={tmp_path}/model",
            "trainer.device=cpu", "trainer.train_batch_size=1", "trainer.policy_mini_batch_size=1",
        ]
    )  # fmt: skip

    class VerifiersExp(BasePPOExp):
        def get_generator(self, cfg, tokenizer, inference_engine_client): ...

    train_dataset = VerifiersExp(config).train_dataset
    assert train_dataset is not None
    assert train_dataset[0].env_class == "will/wordle"
    with pytest.raises(DataError, match="env_class='will/wordle'"):
        BasePPOExp(config)
