"""The run refuses a chat template that cannot be appended to before it loads a weight, and knows the engine's ends."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from skyrl_train.config import load_config
from skyrl_train.engine.torch import TorchEngine
from skyrl_train.entrypoints.main_base import BasePPOExp, main
from skyrl_train.policy.end_of_turn import end_of_turn_ids
from skyrl_train.rollout.template_check import TemplateRefused
from tests.tiny_models import CHATML, VOCAB_SIZE, save_tiny_model

SYSTEM_MOVES = (  # as Mistral's: the system message is printed in the last of the user's
    "{% set system = messages[0].content if messages[0].role == 'system' else '' %}"
    "{% for m in messages if m.role != 'system' %}<|im_start|>{{ m.role }}\n"
    "{{ system if loop.last }}{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
THINKING = CHATML.replace("'<|im_start|>assistant\n' }}", "'<|im_start|>assistant\n<think>\n' }}")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return save_tiny_model(tmp_path / "model")


def arguments(model: Path, *more: str, rows: list[dict[str, Any]] | None = None, template: str = CHATML) -> list[str]:
    """A run of the model in which every prompt is one of the user's, unless rows are given."""
    (model / "rows.jsonl").write_text(
        "\n".join(json.dumps(row) for row in rows or [{"prompt": [{"role": "user", "content": "hi"}]}])
    )
    (model / "mine.jinja").write_text(template)
    return [
        f"trainer.policy.model.path={model}",
        f"trainer.ckpt_path={model / 'run'}",
        f"data.train_data=[{model / 'rows.jsonl'}]",
        "trainer.eval_interval=-1",
        "trainer.train_batch_size=1",
        "trainer.policy_mini_batch_size=1",
        "trainer.device=cpu",
        "trainer.logger=console",
        "environment.env_class=gsm8k_multi_turn",
        "generator.chat_template.source=file",
        f"generator.chat_template.name_or_path={model / 'mine.jinja'}",
        *more,
    ]


def experiment(*given: str) -> BasePPOExp:
    return BasePPOExp(load_config(list(given)))


def test_a_template_that_cannot_grow_is_refused_before_any_weight_is_read(model, capfd):
    for weights in model.glob("*.safetensors"):
        weights.unlink()
    assert main(arguments(model, "generator.max_turns=3", template=THINKING)) == 2
    text = capfd.readouterr().err
    assert "refused: turns cannot be appended" in text
    assert "generator.chat_template.keep_thinking=true" in text


def test_one_turn_and_one_message_ask_nothing_of_the_template(model):
    experiment(*arguments(model, "generator.max_turns=1", template=THINKING))
    experiment(
        *arguments(model, "generator.max_turns=3", "generator.chat_template.keep_thinking=true", template=THINKING)
    )
    one_message = "generator.use_conversation_multi_turn=false"
    experiment(*arguments(model, "generator.max_turns=3", one_message, template=THINKING))


def test_a_row_with_more_turns_than_the_run_is_looked_at_too(model):
    row = {"prompt": [{"role": "user", "content": "hi"}], "max_turns": 2}
    with pytest.raises(TemplateRefused, match="cannot be appended"):
        experiment(*arguments(model, "generator.max_turns=1", rows=[row], template=THINKING))


def test_each_kind_of_prompt_in_the_data_is_looked_at(model):
    user, system = {"role": "user", "content": "hi"}, {"role": "system", "content": "Be brief."}
    plain, moved = [{"prompt": [user]}], [{"prompt": [user]}, {"prompt": [system, user]}]
    experiment(*arguments(model, "generator.max_turns=3", rows=plain, template=SYSTEM_MOVES))
    experiment(*arguments(model, "generator.max_turns=1", rows=moved, template=SYSTEM_MOVES))
    with pytest.raises(TemplateRefused, match="once the conversation goes on"):
        experiment(*arguments(model, "generator.max_turns=3", rows=moved, template=SYSTEM_MOVES))
    unsaid = CHATML.replace("for message in messages", "for message in messages if message.role != 'system'")
    with pytest.raises(TemplateRefused, match="leaves out or changes a message of the role 'system'"):
        experiment(*arguments(model, "generator.max_turns=1", rows=moved, template=unsaid))


@pytest.mark.parametrize("eos", [5, [5, 7], None])
def test_the_chat_and_the_engine_end_turns_at_the_same_tokens(model, eos):
    if eos is None:  # then the model's own configuration counts
        (model / "generation_config.json").unlink()
    else:
        (model / "generation_config.json").write_text(json.dumps({"eos_token_id": eos}))
    exp = experiment(*arguments(model, "trainer.bf16=false"))
    policy = exp.get_policy()
    wanted = {VOCAB_SIZE - 1, *([eos] if isinstance(eos, int) else eos or [])}
    assert set(exp.chat_template.end_ids) == wanted
    assert end_of_turn_ids(policy.module.generation_config, exp.tokenizer) == exp.chat_template.end_ids
    engine = exp.get_engine(policy)
    assert isinstance(engine, TorchEngine)
    assert engine._scheduler._eos_ids == exp.chat_template.end_ids
