"""Metrics under SkyRL's names, from episodes whose numbers can be worked out by hand."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest

from skyrl_train.run.metrics import (
    MetricsLog,
    dump_eval_results,
    eval_metrics,
    read_metrics,
    reduce_metrics,
    rollout_metrics,
    tokens_per_second,
)
from skyrl_train.types import EpisodeEnd
from tests.skyrl_train.run.records.episodes import TOKENIZER, group, prompt, trajectory


def decode(ids: list[int]) -> str:
    return str(TOKENIZER.decode(ids))


def broken(**fields):
    return trajectory(["xxxxxxxx"], [9.0], end=EpisodeEnd.ENV_FAILURE, num_attempts=3, failure="gone", **fields)


def test_rewards_of_two_prompts():
    a, b = prompt("a"), prompt("b")
    groups = [
        group(trajectory(["x", "y"], [-1.0, 2.0], of=a), trajectory(["x"], [0.0], of=a)),
        group(trajectory(["x"], [0.0], of=b), trajectory(["x", "y"], [0.5, -1.5], of=b)),
    ]
    found = rollout_metrics(groups)
    assert found["reward/avg_raw_reward"] == (1.0 + 0.0 + 0.0 - 1.0) / 4
    assert found["reward/avg_pass_at_2"] == 0.5  # a has an episode above 0, b has not
    assert found["reward/mean_positive_reward"] == (2.0 + 0.0 + 0.0 + 0.5) / 4
    assert (found["reward/min_raw_reward"], found["reward/max_raw_reward"]) == (-1.0, 1.0)


def test_lengths_count_what_is_behind_the_prompt_observations_included():
    groups = [group(trajectory(["ab", "c"], [0.0, 1.0], observation="123"), trajectory(["d"], [0.0]))]
    found = rollout_metrics(groups)  # 2 + 3 + 1 = 6 tokens, and 1
    assert (found["generate/min_num_tokens"], found["generate/max_num_tokens"]) == (1, 6)
    assert found["generate/avg_num_tokens"] == 3.5
    assert found["generate/std_num_tokens"] == 2.5
    assert found["generate/avg_tokens_non_zero_rewards"] == 6
    assert found["generate/avg_tokens_zero_rewards"] == 1
    assert found["generate/num_sampled_tokens"] == 4
    assert found["generate/num_turns"] == 1.5


def test_an_episode_of_negative_reward_is_neither_among_the_paid_nor_among_those_with_zero():
    found = rollout_metrics([group(trajectory(["abc"], [-1.0]), trajectory(["d"], [0.0]), trajectory(["ef"], [1.0]))])
    assert found["generate/avg_tokens_zero_rewards"] == 1
    assert found["generate/avg_tokens_non_zero_rewards"] == 2


def test_an_environment_failure_is_counted_and_is_no_reward_and_no_length():
    found = rollout_metrics([group(trajectory(["x"], [1.0]), broken()), group(broken(of=prompt("b")))])
    assert found["generate/env_failures"] == found["generate/end_env_failure"] == 2
    assert found["generate/retries"] == 4
    assert found["generate/num_episodes"] == 3
    assert found["generate/max_num_tokens"] == 1
    assert found["reward/avg_raw_reward"] == 1.0
    assert found["reward/avg_pass_at_2"] == 1.0  # a prompt whose episodes all broke says nothing
    assert "reward/avg_raw_reward" not in rollout_metrics([group(broken())])


def test_ends_are_counted():
    ends = [EpisodeEnd.FINISHED, EpisodeEnd.OUT_OF_TOKENS, EpisodeEnd.OUT_OF_TOKENS, EpisodeEnd.OUT_OF_TURNS]
    found = rollout_metrics([group(*(trajectory(["x"], [0.0], end=end) for end in ends))])
    assert found["generate/truncated"] == found["generate/end_out_of_tokens"] == 2
    assert found["generate/end_finished"] == found["generate/end_out_of_turns"] == 1


def test_replies_that_were_cut_or_held_no_action_are_shares_of_all_replies():
    cut = replace(trajectory(["x"], [0.0]), turns=[replace(trajectory(["x"], [0.0]).turns[0], stop_reason="length")])
    two_of_three = trajectory(["x", "y", "z"], [0.0] * 3, env_metrics={"invalid_actions": 2})
    none = trajectory(["x"], [0.0], env_metrics={"invalid_actions": False})
    found = rollout_metrics([group(two_of_three, none, cut, broken(env_metrics={"invalid_actions": 1}))])
    assert found["generate/cut_reply_share"] == 1 / 5
    assert found["generate/invalid_action_share"] == 2 / 4  # cut's environment does not count them
    assert "generate/invalid_action_share" not in rollout_metrics([group(cut)])
    assert eval_metrics([group(two_of_three)])["eval/all/generate/invalid_action_share"] == 2 / 3


def test_an_environment_cannot_make_more_than_all_actions_unreadable():
    odd = [trajectory(["x"], [0.0], env_metrics={"invalid_actions": count}) for count in (7, "many", 0)]
    assert rollout_metrics([group(*odd)])["generate/invalid_action_share"] == 1 / 2


def test_episodes_without_a_token_and_rewards_before_the_first_one_are_counted():
    silent, late = trajectory([""], [0.5]), trajectory(["", "x"], [0.5, 1.0])
    found = rollout_metrics([group(silent, late, trajectory(["x"], [1.0]), broken())])
    assert found["generate/episodes_without_tokens"] == 1
    assert found["reward/unplaced_turns"] == 2


def test_metrics_of_two_environments_do_not_hide_each_other():
    def played(env_class, won):
        return group(trajectory(["x"], [0.0], of=prompt(env_class=env_class), env_metrics={"won": won}))

    both = rollout_metrics([played("records_a", True), played("records_b", False), played("records_b", True)])
    assert both["environment/records_a/won"] == 1.0
    assert both["environment/records_b/won"] == 0.5
    assert rollout_metrics([played("records_a", True)])["environment/won"] == 1.0


def test_several_data_sources_of_one_environment_are_told_apart():
    def played(source, won):
        of = replace(prompt(env_class="openenv"), env_extras={"data_source": source})
        return group(trajectory(["x"], [float(won)], of=of, env_metrics={"won": won}))

    found = rollout_metrics([played("openenv/a", True), played("openenv/b", False), played("openenv/b", True)])
    assert (found["reward/openenv_a/avg_raw_reward"], found["reward/openenv_b/avg_raw_reward"]) == (1.0, 0.5)
    assert (found["environment/openenv_a/won"], found["environment/openenv_b/won"]) == (1.0, 0.5)
    assert found["environment/won"] == 2 / 3
    alone = rollout_metrics([played("openenv/a", True)])
    assert not any("openenv_a" in key for key in alone)


def test_an_episode_without_metrics_does_not_thin_the_mean():
    groups = [group(trajectory(["x"], [0.0], env_metrics={"won": True}), trajectory(["x"], [0.0]))]
    assert rollout_metrics(groups)["environment/won"] == 1.0


def test_eval_metrics_by_data_source():
    groups = [
        group(trajectory(["x"], [1.0], of=prompt("0", "openai/gsm8k"))),
        group(trajectory(["x"], [0.0], of=prompt("1", "echo"))),
    ]
    found = eval_metrics(groups)
    assert found["eval/openai_gsm8k/avg_score"] == 1.0
    assert found["eval/echo/pass_at_1"] == 0.0
    assert found["eval/all/avg_score"] == found["eval/all/mean_positive_reward"] == 0.5
    assert found["eval/all/generate/avg_num_tokens"] == 1


def test_reduction_by_the_end_of_the_key():
    parts = [{"kl_max": 1.0, "kl_min": 1.0, "kl": 1.0}, {"kl_max": 3.0, "kl_min": 3.0, "kl": 3.0}, {"other": 5.0}]
    assert reduce_metrics(parts) == {"kl_max": 3.0, "kl_min": 1.0, "kl": 2.0, "other": 5.0}


def test_tokens_per_second_is_of_the_whole_step():
    assert tokens_per_second({"generate/num_sampled_tokens": 100, "timing/step": 4.0, "timing/generate": 1.0}) == 25.0
    assert tokens_per_second({"timing/step": 4.0}) is None


def test_the_log_can_be_read_back_also_when_it_was_torn(tmp_path):
    log = MetricsLog(tmp_path)
    log.log(0, {"eval/all/avg_score": 0.5})
    log.log(1, {"a": 1.0, "grad": math.nan})
    log.log(1, {"b": math.inf})
    log.close()
    path = tmp_path / "metrics.jsonl"
    assert all(json.loads(line, parse_constant=pytest.fail) for line in path.read_text().splitlines())  # strict JSON
    path.write_bytes(path.read_bytes() + b'{"step": 2, "a": 0.')
    first, second = read_metrics(path)
    assert (first["step"], first["eval/all/avg_score"]) == (0, 0.5)
    assert (second["step"], second["a"], second["b"]) == (1, 1.0, math.inf)
    assert math.isnan(second["grad"])


def test_elapsed_time_goes_on_over_processes(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "elapsed_s": 100.0}\n')
    log = MetricsLog(tmp_path)
    log.log(2, {})
    log.close()
    assert 100.0 <= read_metrics(log.path)[-1]["elapsed_s"] < 1000.0


@pytest.mark.parametrize(("step", "name"), [(4, "global_step_4_evals"), (None, "eval_only")])
def test_dumped_evals(tmp_path, step, name):
    kept = trajectory(["no", "hi"], [0.0, 1.0], of=prompt("0", "a/b"), observation="[?]")
    path = dump_eval_results(tmp_path, [group(kept), group(kept)], {"eval/all/avg_score": 1.0}, step, decode)
    assert path == tmp_path / "dumped_evals" / name
    lines = [json.loads(line) for line in (path / "a_b.jsonl").read_text().splitlines()]
    assert len(lines) == 2
    assert lines[0] == {
        "input_prompt": "say hi>", "output_response": "no[?]hi", "score": 1.0, "stop_reason": "stop",
        "env_class": "records_a", "env_extras": {"data_source": "a/b"}, "data_source": "a/b",
    }  # fmt: skip
    assert json.loads((path / "aggregated_results.jsonl").read_text()) == {"eval/all/avg_score": 1.0}


@pytest.mark.parametrize(
    "source", ["long" * 100, "é" * 200, "\ud800", "a\x00b", "two\nlines", ".", "..", "aggregated_results"]
)
def test_any_data_source_is_dumped(tmp_path, source):
    kept = trajectory(["no"], [0.0], of=prompt("0", source))
    path = dump_eval_results(tmp_path, [group(kept)], {}, 1, decode)
    [file] = [file for file in path.iterdir() if file.name != "aggregated_results.jsonl"]
    assert json.loads(file.read_text())["data_source"] == source
    assert len(eval_metrics([group(kept)])) > 0
