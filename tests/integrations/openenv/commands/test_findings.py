from __future__ import annotations

from typing import Any

from integrations.openenv.commands.findings import report
from integrations.openenv.commands.measure import Measurements, PlayedEpisode


def episode(reward: float, **more: Any) -> PlayedEpisode:
    fields: dict[str, Any] = {"texts": ["board", "end"], "ended": True, "observations": [{"a": 1}, {"a": 2}]}
    fields |= {"replies": ["x"], "rewards": [reward]}
    return PlayedEpisode(sent=[{}], step_s=[0.01], **{**fields, **more})


def measurements(**more: Any) -> Measurements:
    """Return measurements of an environment without any fault, with `more` changed."""
    fields: dict[str, Any] = {
        "first_prompts": ["a", "b"],
        "random": [episode(0.0), episode(0.5)],
        "again": [episode(0.0)],
        "gold": [episode(1.0), episode(1.0)],
        "num_sessions": 16,
        "num_sessions_again": 16,
        "left_processes": [],
    }
    return Measurements("env", **{**fields, **more})


def words(**more: Any) -> str:
    return "; ".join(f"{finding.level}: {finding.words}" for finding in report(measurements(**more)).findings)


def test_a_good_environment_has_no_findings() -> None:
    assert words() == ""
    assert report(measurements()).passed


def test_rewards_must_vary_and_reward_playing_well() -> None:
    same = {"random": [episode(1.0), episode(1.0)], "again": []}
    assert "fail: the reward never varies: every episode earned 1;" in words(**same)
    assert "fail: playing well earns no more (0.25) than playing at random (0.25)" in words(
        gold=[episode(0.0), episode(0.5)]
    )
    assert words(random=[episode(0.0), episode(0.0)]).startswith("warn: random play always earns 0")


def test_few_episodes_of_equal_reward_may_be_chance() -> None:
    few, enough = ({"random": [episode(0.0)] * count, "again": [], "gold": []} for count in (9, 10))
    assert "warn: all 9 episodes earned 0, which may be chance: give -n 20" in words(**few)
    assert report(measurements(**few)).passed
    assert "fail: the reward never varies: every episode earned 0;" in words(**enough)
    cut = {**few, "random": [episode(0.0, ended=False)]}
    assert "fail: the reward never varies: every episode earned 0 and none reached its end" in words(**cut)


def test_a_gold_player_must_keep_its_promise() -> None:
    assert "fail: the gold player earned 0.9 where 1 is promised" in words(
        gold=[episode(0.9, gold_reward=1.0), episode(1.0, gold_reward=1.0)]
    )
    assert "warn: no gold player is known" in words(gold=[])


def test_what_training_sees_must_repeat() -> None:
    assert "fail: the same seed and actions gave different texts and rewards" in words(
        again=[episode(0.1, texts=["board", "other"])]
    )
    unseen = words(again=[episode(0.0, observations=[{"a": 1, "time": 3}, {"a": 2}])])
    assert unseen == "warn: fields that nobody reads differ between repetitions: time"


def test_an_episode_must_have_a_task_a_length_and_an_end() -> None:
    unlike = [episode(1.0, replies=["x"]), episode(1.0, replies=["y"])]
    assert "no two seeds were seen to differ" in words(first_prompts=["a", "a"])
    assert "seeds" not in words(first_prompts=["a", "a"], gold=unlike)  # a good player does not do the same
    assert "(1 episodes)" in words(first_prompts=["a", "a"], elsewhere=[episode(0.0)])
    for secret in ({"rewards": [1.0]}, {"texts": ["board", "other"]}, {"ended": False}):
        assert "seeds" not in words(first_prompts=["a", "a"], elsewhere=[episode(0.0, **secret)])
    silent = [episode(reward, texts=["", "end"]) for reward in (0.0, 0.5)]
    assert "the first observation is empty and all prompts are equal" in words(
        first_prompts=["a", "a"], random=silent, again=[]
    )
    assert "fail: a turn's text has 9000 characters" in words(gold=[episode(1.0, texts=["x" * 9000])])
    endless = {"random": [episode(0.0, ended=False), episode(0.5, ended=False)], "gold": [], "again": []}
    assert "no episode ended by itself" in words(**endless)


def test_the_server_must_give_back_what_it_took() -> None:
    assert words(num_sessions=1, num_sessions_again=1).startswith("warn: the server takes one session at a time")
    assert words(num_sessions_again=12) == "fail: 4 of 16 sessions were not free again after they were closed"
    assert words(left_processes=[7, 8]) == "fail: processes were left running: 7, 8"
    assert words(left_processes=None) == ""
    assert words(left_containers=["skyrl-openenv-7"]) == "fail: containers were left: skyrl-openenv-7"


def test_failures_and_refusals_are_counted() -> None:
    assert "fail: 1 episodes failed: it died" in words(gold=[episode(1.0), episode(1.0, failure="it died")])
    refused = [episode(reward, num_invalid=1, refusals=["no data set was loaded"]) for reward in (0.0, 0.5)]
    assert "refused 100% of the random actions" in words(random=refused)
    assert "most often: no data set was loaded" in words(random=refused)
    broken = report(Measurements("env", failure="no server"))
    assert [finding.words for finding in broken.findings] == ["nothing could be played: no server"]
    assert not broken.passed


def test_null_for_a_reward_now_and_then_is_told_for_it_may_be_nan() -> None:
    paid_at_the_end = [episode(1.0, paid=[False, False, True]), episode(0.5, paid=[False, True])]
    assert "null" not in words(gold=paid_at_the_end)
    assert "warn: the server paid null in 1 turns" in words(gold=[episode(1.0, paid=[True, False, True])])
    assert "warn: the server paid null in 1 turns" in words(gold=[*paid_at_the_end, episode(1.0, paid=[False])])
