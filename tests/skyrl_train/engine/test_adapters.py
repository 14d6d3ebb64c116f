"""The engine samples from base and adapters, with the learner's logprobs, after every update."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from skyrl_train.engine.torch.forward import forward_pass
from skyrl_train.ops.cpu.decoder import PackedDecoder
from skyrl_train.policy.attention import PackedAttention
from tests.skyrl_train.engine.conftest import answers, ask
from tests.skyrl_train.learner.test_learner import learner_for, prepared, trainer_config
from tests.skyrl_train.policy.test_lora import adapted, logits_of
from tests.tiny_models import tiny_policy


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_the_decoder_computes_base_and_adapters(family):
    policy = adapted(family, moved=0.05)
    decoder, _ = forward_pass(policy)
    assert isinstance(decoder, PackedDecoder)
    assert (logits_of(policy) - logits_of(tiny_policy(family))).abs().max() > 0.05
    assert_close(logits_of(decoder), logits_of(policy), atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize(("family", "config"), [("llama", {}), ("granite", {})])
async def test_after_every_update_the_engine_samples_with_the_learners_logprobs(make_engine, family, config):
    """llama takes the decoder, granite the module itself."""
    settings = trainer_config()
    policy = adapted(family, **config)
    learner, engine = learner_for(settings, policy=policy), make_engine(policy)
    texts = set()
    for version in range(1, 4):
        learner.update(prepared(learner, settings))
        await engine.weights_changed(version)
        [done] = await answers(engine, [ask("ab", temperature=1.0, max_tokens=10)])
        ids = torch.tensor([*ask("ab").prompt_ids, *done.response_ids])
        with torch.inference_mode():
            attention = PackedAttention(torch.tensor([0, len(ids)]))
            logits = policy.logits(policy.hidden_states(ids, torch.arange(len(ids)), attention))
        expected = logits.log_softmax(-1)[:-1].gather(1, ids[1:, None])[-len(done.response_ids) :, 0]
        assert_close(torch.tensor(done.logprobs), expected, rtol=1e-4, atol=1e-4)
        texts.add(tuple(done.logprobs))
    assert len(texts) == 3
