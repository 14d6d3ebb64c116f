"""The example of an agent with its own client: what it does with a reply, and its command with a tiny model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from openai import AsyncOpenAI

from examples.openai_agent import agent, episodes
from integrations.openenv.hosting.server_process import ServerProcess
from skyrl_train.engine.base import SamplingParams
from skyrl_train.rollout.agents.endpoint import Endpoint
from skyrl_train.rollout.chat import ChatTemplate
from skyrl_train.run.metrics import read_metrics
from tests.docs.pages import ROOT, typed_here
from tests.fakes import ScriptedEngine
from tests.tiny_models import save_tiny_model, tiny_tokenizer

EXAMPLE = ROOT / "examples" / "openai_agent"


async def test_the_agent_asks_again_for_an_action_and_has_the_environment_say_it(monkeypatch: pytest.MonkeyPatch):
    replies = ["I would say it.", "Here: <action>red lamp tree</action> done"]
    engine = ScriptedEngine(tiny_tokenizer(), lambda request: replies[len(engine.requests) - 1])
    sampling = SamplingParams(max_tokens=60)
    endpoint = Endpoint(engine, ChatTemplate(engine.tokenizer), sampling, model="policy")
    await endpoint.start()
    server = await ServerProcess.start("integrations.openenv.servers.echo_env", max_sessions=2, timeout_s=60)
    monkeypatch.setenv("ECHO_URL", server.url)
    try:
        async with AsyncOpenAI(base_url=f"{endpoint.url}/v1", api_key="unused", max_retries=0) as client:
            messages = [{"role": "user", "content": "Say it."}]
            assert await agent.solve(messages, client) == "red lamp tree"
            assert [message["role"] for message in messages] == ["user", "assistant", "user"]
            engine.requests.clear()
            replies[1] = "no"
            assert await agent.solve([{"role": "user", "content": "Say it."}], client) == ""
    finally:
        server.stop()
        endpoint.close()


def test_the_command_trains_the_model_that_the_agent_asks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    save_tiny_model(tmp_path / "model", max_position_embeddings=1024)
    (tmp_path / "few.jsonl").write_text("".join(json.dumps(row) + "\n" for row in episodes.rows(4, seed=0)))
    typed_here(
        "python train.py", EXAMPLE, f"trainer.policy.model.path={tmp_path}/model", "trainer.device=cpu",
        "trainer.bf16=false", "trainer.train_batch_size=2", "trainer.policy_mini_batch_size=2",
        f"data.train_data=['{tmp_path}/few.jsonl']", "generator.n_samples_per_prompt=2",
        "generator.max_input_length=900", "trainer.max_prompt_length=900",
        "trainer.ckpt_interval=-1", "trainer.eval_interval=-1",
    )  # fmt: skip
    lines = read_metrics(tmp_path / "ckpts" / "openai_agent" / "metrics.jsonl")
    assert [line["step"] for line in lines][-2:] == [1, 2]
    for line in lines[-2:]:
        assert line["generate/num_turns"] == 2.0
        assert line["generate/env_failures"] == 0
        assert line["policy/rollout_train_logprobs_abs_diff_turn_2"] < 1e-4
