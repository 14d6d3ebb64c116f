"""Dynamic sampling: which groups a step learns from, what it costs, and that a resumed run goes on with its data."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from skyrl_train.batch.packing import pack
from skyrl_train.batch.samples import to_samples
from skyrl_train.config import DynamicSamplingConfig, SkyRLConfig
from skyrl_train.entrypoints.main_base import main
from skyrl_train.rollout.dynamic_sampling import DynamicSampling, TooManyBatches, scores_differ
from skyrl_train.run.metrics import read_metrics
from skyrl_train.run.records.trajectories import read_trajectories, trajectory_files
from skyrl_train.types import EpisodeEnd, Group, Prompt, Trajectory, Turn

ONE_EPISODE = ["generator.n_samples_per_prompt=1", "trainer.algorithm.advantage_estimator=reinforce++"]
OF_THE_CLOCK = {"time", "elapsed_s", "generate/avg_episode_seconds"}


def group(uid: str, *rewards: float, failed: int = 0) -> Group:
    """A group with an episode of two sampled tokens for each reward, and so many that their environment failed."""
    prompt = Prompt(uid, [{"role": "user", "content": uid}], "even")
    turns = [[Turn([1, 2], [3, 4], [-0.1, -0.2], reward, "x", "stop", 0)] for reward in rewards]
    played = [Trajectory(prompt, i, 0, prompt.messages, turn, EpisodeEnd.FINISHED) for i, turn in enumerate(turns)]
    broken = [
        Trajectory(prompt, len(played) + i, 0, prompt.messages, [], EpisodeEnd.ENV_FAILURE) for i in range(failed)
    ]
    return Group(prompt, played + broken)


def sampling(num_groups: int = 2, **config: object) -> DynamicSampling:
    return DynamicSampling(DynamicSamplingConfig(**config), num_groups, seed=1)


def uids(rollout: DynamicSampling) -> list[str]:
    return [group.prompt.uid for group in rollout.groups]


def test_scores_differ_unless_they_are_equal_up_to_rounding():
    assert scores_differ(group("a", 0.0, 1.0))
    assert not scores_differ(group("a", 1.0, 1.0))
    assert not scores_differ(group("a", 0.1 + 0.2, 0.3))
    assert scores_differ(group("a", 1e6, 1e6 + 10))
    assert not scores_differ(group("a", 1.0, failed=3))  # one episode is left: there is nothing to compare it with
    assert not scores_differ(group("a", failed=2))
    assert scores_differ(group("a", 0.0, 1.0, failed=1))


def test_samples_of_a_users_hook_are_scored_as_they_are_trained():
    plain = group("a", 1.0, 1.0)
    [first, second] = plain.trajectories
    shaped = replace(second, samples=[sample.plus(-0.5) for sample in to_samples([second])])
    assert scores_differ(Group(plain.prompt, [first, shaped]))


def test_without_a_type_one_batch_is_taken_as_it_is():
    rollout = sampling(num_groups=3)
    assert not rollout.is_done
    rollout.add([group("a", 1.0, 1.0), group("b", 0.0, 1.0)])
    assert rollout.is_done
    assert uids(rollout) == ["a", "b"]
    assert rollout.metrics() == {}


def test_filter_collects_different_groups_over_batches_and_drops_what_is_too_much():
    rollout = sampling(num_groups=2, type="filter")
    rollout.add([group("a", 1.0, 1.0), group("b", 0.0, 1.0)])
    assert not rollout.is_done
    rollout.add([group("c#1", 1.0, 0.0), group("d#1", 0.0, 1.0)])
    assert rollout.is_done
    assert uids(rollout) == ["b", "c#1"]
    assert rollout.metrics() == {
        "dynamic_sampling/num_batches": 2.0,
        "dynamic_sampling/different_group_share": 0.75,
        "dynamic_sampling/num_dropped_episodes": 4.0,  # those of a, and of d#1, which came too late
        "dynamic_sampling/num_dropped_tokens": 8.0,
    }


def test_a_prompt_that_a_step_plays_twice_is_another_prompt_the_second_time():
    rollout = sampling(num_groups=2, type="filter")
    assert rollout.uid_of(group("a").prompt) == "a"
    rollout.add([group("a", 0.0, 1.0), group("b", 1.0, 1.0)])
    assert rollout.uid_of(group("a").prompt) == "a#1"
    rollout.add([group("a#1", 0.0, 1.0), group("b#1", 1.0, 1.0)])
    batch = pack(to_samples([t for kept in rollout.groups for t in kept.trajectories]))
    assert batch.group_index.tolist() == [0, 0, 1, 1]


def test_replace_puts_different_groups_in_the_place_of_the_others():
    rollout = sampling(num_groups=5, type="replace", min_replace_ratio=0.3)
    equal = [group(uid, 1.0, 1.0) for uid in "abc"]
    rollout.add([equal[0], group("x", 0.0, 1.0), equal[1], group("y", 1.0, 0.0), equal[2]])
    assert rollout.is_done
    found = uids(rollout)
    assert found[1] == "x"
    assert found[3] == "y"
    replacements = [uid.partition("=") for uid in (found[0], found[2], found[4])]
    assert [place for place, _, _ in replacements] == ["a", "b", "c"]
    assert {taken for _, _, taken in replacements[:2]} == {"x", "y"}  # none twice before all were taken
    samples = to_samples([t for kept in rollout.groups for t in kept.trajectories])
    assert len({sample.group_id for sample in samples}) == 5
    assert len({sample.trajectory_id for sample in samples}) == 10
    assert rollout.metrics()["dynamic_sampling/num_dropped_episodes"] == 6.0
    again = sampling(num_groups=5, type="replace")
    again.add([equal[0], group("x", 0.0, 1.0), equal[1], group("y", 1.0, 0.0), equal[2]])
    assert uids(again) == found  # drawn from the seed, whatever the hashes of strings are


def test_replace_also_renames_the_samples_that_a_users_hook_made():
    different = group("x", 0.0, 1.0)
    own = [replace(t, samples=to_samples([t])) for t in different.trajectories]
    rollout = sampling(num_groups=2, type="replace")
    rollout.add([Group(different.prompt, own), group("a", 1.0, 1.0)])
    samples = to_samples([t for kept in rollout.groups for t in kept.trajectories])
    assert [sample.group_id for sample in samples] == ["x", "x", "a=x", "a=x"]
    assert [sample.trajectory_id for sample in samples] == ["x_0", "x_1", "a=x_0", "a=x_1"]


def test_replace_drops_a_batch_of_which_no_more_than_the_share_is_different():
    rollout = sampling(num_groups=2, type="replace", min_replace_ratio=0.5)
    rollout.add([group("a", 1.0, 1.0), group("b", 0.0, 1.0)])  # exactly one half
    assert not rollout.is_done
    rollout.add([group("c#1", 1.0, 0.0), group("d#1", 0.0, 1.0)])
    assert uids(rollout) == ["c#1", "d#1"]
    assert rollout.metrics()["dynamic_sampling/num_dropped_episodes"] == 4.0


@pytest.mark.parametrize("kind", ["filter", "replace"])
def test_a_step_gives_up_after_its_last_batch_and_says_what_to_do(kind):
    rollout = sampling(num_groups=2, type=kind, max_sample_batches=2)
    rollout.add([group("a", 1.0, 1.0), group("b", 0.0, 0.0)])
    with pytest.raises(TooManyBatches, match=r"0 of 4 prompts score differently.*max_sample_batches=2 batches"):
        rollout.add([group("c", 1.0, 1.0), group("d", 1.0, 1.0)])
    endless = sampling(num_groups=2, type=kind, max_sample_batches=0)
    for _ in range(40):
        endless.add([group("a", 1.0, 1.0), group("b", 0.0, 0.0)])
    assert not endless.is_done


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["type=drop"], "filter"),
        (["type=replace", "min_replace_ratio=1"], "at least 0 and below 1"),
        (["type=filter", *ONE_EPISODE], "compares the episodes of a prompt"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings, words):
    whole = [text if "." in text.split("=")[0] else f"trainer.algorithm.dynamic_sampling.{text}" for text in settings]
    with pytest.raises(ValueError, match=words):
        SkyRLConfig.from_cli_overrides(["data.train_data=['x.jsonl']", *whole])


# Whole runs


@pytest.fixture(scope="module")
def train(given: Path) -> Callable[..., int]:
    """Return a function: folder and settings -> exit status of a run with two steps an epoch, two prompts each."""

    def train(folder: Path, *more: str) -> int:
        return main(
            [
                f"data.train_data=['{given}/data.jsonl']",
                "data.val_data=[]",
                "trainer.eval_before_train=false",
                f"trainer.policy.model.path={given}/model",
                f"trainer.ckpt_path={folder}",
                f"trainer.export_path={folder}/exports",
                "trainer.device=cpu",
                "trainer.bf16=false",
                "trainer.ckpt_interval=1",
                "trainer.epochs=2",
                "environment.env_class=even",
                "trainer.train_batch_size=2",
                "trainer.policy_mini_batch_size=2",
                "trainer.algorithm.use_kl_loss=false",
                "generator.n_samples_per_prompt=2",
                "generator.sampling_params.max_generate_length=1",
                *more,
            ]
        )

    return train


@pytest.fixture(scope="module")
def filtered(train: Callable[..., int], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("filtered") / "run"
    assert train(folder, "trainer.algorithm.dynamic_sampling.type=filter") == 0
    return folder


def test_every_step_of_a_run_with_filter_learns_from_a_whole_batch(filtered):
    lines = read_metrics(filtered / "metrics.jsonl")
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert sum(line["dynamic_sampling/num_batches"] for line in lines) > 4  # some groups scored equally
    for line in lines:
        assert line["reward/equal_group_share"] == 0.0
        assert line["loss/avg_raw_advantages_abs"] > 0.5
        assert line["generate/num_episodes"] == 4 * line["dynamic_sampling/num_batches"]
        kept = read_trajectories(trajectory_files(filtered, "train")[line["step"]])
        assert len(kept) == line["generate/num_episodes"]  # those that were dropped are on the disk too


def test_a_resumed_run_goes_on_with_the_prompts_behind_those_it_has_played(filtered, train, tmp_path):
    stopped = tmp_path / "run"
    shutil.copytree(filtered, stopped)
    for step in (3, 4):
        shutil.rmtree(stopped / f"global_step_{step}")
    (stopped / "latest_ckpt_global_step.txt").write_text("2")
    assert train(stopped, "trainer.algorithm.dynamic_sampling.type=filter") == 0
    timeless = [
        [
            {key: value for key, value in line.items() if not key.startswith("timing/") and key not in OF_THE_CLOCK}
            for line in read_metrics(folder / "metrics.jsonl")
        ]
        for folder in (filtered, stopped)
    ]
    assert json.dumps(timeless[0]) == json.dumps(timeless[1])


def test_a_run_whose_prompts_never_differ_ends_with_the_reason(train, tmp_path, capfd):
    settings = ["type=replace", "min_replace_ratio=0.99", "max_sample_batches=2"]
    assert train(tmp_path / "run", *[f"trainer.algorithm.dynamic_sampling.{text}" for text in settings]) == 1
    printed = " ".join(capfd.readouterr().err.split())
    assert "after trainer.algorithm.dynamic_sampling.max_sample_batches=2 batches" in printed
    assert "Traceback" not in printed
