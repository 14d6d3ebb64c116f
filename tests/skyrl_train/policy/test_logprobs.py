"""Chunked logprobs equal the log_softmax of all logits at once, values and gradients."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from skyrl_train.policy.attention import PackedAttention
from skyrl_train.policy.logprobs import batch_logprobs, chunked_logprobs
from tests.skyrl_train.batches import random_batch
from tests.tiny_models import tiny_policy


def full_logprobs(hidden, targets, head, temperature):
    log_p = torch.log_softmax(head(hidden).float() / temperature, dim=-1)
    return log_p.gather(1, targets[:, None])[:, 0], -(log_p.exp() * log_p).sum(1)


@pytest.mark.parametrize("logits_per_chunk", [1, 7 * 3, 7 * 100])
@pytest.mark.parametrize("parts", ["logprobs", "entropy", "both"])
def test_values_and_gradients_equal_those_of_the_full_logits(logits_per_chunk, parts):
    torch.manual_seed(0)
    head = nn.Linear(5, 7)
    hidden = torch.randn(11, 5, requires_grad=True)
    targets = torch.randint(7, (11,))
    pulls = torch.randn(2, 11) * torch.tensor([[parts != "entropy"], [parts != "logprobs"]])
    inputs = [hidden, *head.parameters()]

    expected = full_logprobs(hidden, targets, head, 0.7)
    expected_gradients = torch.autograd.grad((pulls[0] * expected[0] + pulls[1] * expected[1]).sum(), inputs)
    chunked = chunked_logprobs(
        hidden,
        targets,
        head,
        list(head.parameters()),
        temperature=0.7,
        with_entropy=True,
        logits_per_chunk=logits_per_chunk,
    )
    for ours, theirs in zip(chunked, expected, strict=True):
        assert_close(ours, theirs)
    loss = sum((pull * part).sum() for pull, part in zip(pulls, chunked, strict=True) if pull.any())
    for ours, theirs in zip(torch.autograd.grad(loss, inputs), expected_gradients, strict=True):
        assert_close(ours, theirs)


def test_never_more_logits_than_a_chunk():
    rows = []

    def head(hidden):
        rows.append(len(hidden))
        return hidden @ torch.ones(4, 10)

    hidden = torch.randn(23, 4, requires_grad=True)
    logprobs, _ = chunked_logprobs(hidden, torch.zeros(23).long(), head, [], temperature=1.0, logits_per_chunk=50)
    logprobs.sum().backward()
    assert max(rows) == 5


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_a_packed_batch_equals_one_sample_at_a_time_through_transformers_logits(family):
    policy = tiny_policy(family)
    batch = random_batch()
    logprobs, entropies = batch_logprobs(policy, batch, temperature=1.3, with_entropy=True)
    for i in range(batch.num_samples):
        sample = batch.select([i])
        ids = sample.input_ids
        hidden = policy.hidden_states(ids, torch.arange(len(ids)), PackedAttention(sample.offsets))
        expected, entropy = full_logprobs(hidden[:-1], ids[1:], policy.logits, 1.3)
        here = slice(int(batch.offsets[i]), int(batch.offsets[i + 1]))
        mask = sample.loss_mask
        assert_close(logprobs[here][mask], expected[mask[1:]])
        assert_close(entropies[here][mask], entropy[mask[1:]])
    assert logprobs[~batch.loss_mask].abs().sum() == 0


def test_tied_embeddings_get_the_gradient_of_both_uses():
    policy = tiny_policy(tie_word_embeddings=True)
    batch = random_batch(num_prompts=1)
    weight = policy.module.get_input_embeddings().weight
    assert policy.module.get_output_embeddings().weight is weight
    logprobs, _ = batch_logprobs(policy, batch, temperature=1.0)
    [gradient] = torch.autograd.grad(logprobs.sum(), weight)

    hidden = policy.hidden_states(batch.input_ids, batch.position_ids, PackedAttention(batch.offsets))
    tokens = torch.nonzero(batch.loss_mask).flatten()
    expected, _ = full_logprobs(hidden[tokens - 1], batch.input_ids[tokens], policy.logits, 1.0)
    [expected_gradient] = torch.autograd.grad(expected.sum(), weight)
    assert_close(gradient, expected_gradient, rtol=1e-4, atol=1e-5)


def test_a_batch_without_trained_tokens_has_logprobs_zero():
    batch = random_batch(num_prompts=1)
    batch.loss_mask[:] = False
    logprobs, entropies = batch_logprobs(tiny_policy(), batch, temperature=1.0, with_entropy=True)
    assert logprobs.abs().sum() == entropies.abs().sum() == 0


def test_the_softmax_is_the_same_in_slices_of_a_few_rows(monkeypatch):
    torch.manual_seed(0)
    head, targets = nn.Linear(5, 7), torch.randint(7, (11,))
    hidden = torch.randn(11, 5, requires_grad=True)

    def outcome() -> list[torch.Tensor]:
        both = chunked_logprobs(
            hidden, targets, head, list(head.parameters()), temperature=0.7, with_entropy=True, logits_per_chunk=70
        )
        return [*both, *torch.autograd.grad(both[0].sum() + 2 * both[1].sum(), [hidden, *head.parameters()])]

    whole = outcome()
    monkeypatch.setattr("skyrl_train.ops.reference.SOFTMAX_AT_ONCE", 3 * 7)
    for sliced, expected in zip(outcome(), whole, strict=True):
        assert_close(sliced, expected)
