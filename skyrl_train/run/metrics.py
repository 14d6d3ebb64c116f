"""Metrics of rollouts and evaluations under SkyRL's names, and the log of metrics that every run keeps."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from loguru import logger

from skyrl_gym.contract import Outcome, checked_metrics
from skyrl_gym.metrics import INVALID_ACTIONS, aggregate_for_environment, default_aggregate_metrics
from skyrl_gym.reply import printable
from skyrl_train.batch.samples import num_unplaced_rewards
from skyrl_train.files import naming, whole_folder
from skyrl_train.run.digests import text_digest
from skyrl_train.run.run_folder import METRICS
from skyrl_train.types import AGENT, EpisodeEnd, Group, Trajectory
from skyrl_train.visible import words_of

Metrics = dict[str, float]
AGGREGATED = "aggregated_results"  # the file of an evaluation's metrics beside those of the data sources
LONGEST_NAME = 150  # bytes of a data source's name; a file's has 255 at most
# Names of SkyRL's timings (timing/...) for people, in the order of the phases.
PHASES = {
    "generate": "rollout",
    "fwd_logprobs_values_reward": "logprobs",
    "compute_advantages_and_returns": "advantages",
    "policy_train": "update",
    "sync_weights": "weights",
    "eval": "evaluation",
}


def rollout_metrics(groups: list[Group]) -> Metrics:
    """Return `generate/`, `environment/`, `reward/` and `rewards/` of one step. Failed episodes count only as such."""
    trajectories = [t for group in groups for t in group.trajectories]
    valid = [t for t in trajectories if t.end is not EpisodeEnd.ENV_FAILURE]
    found = _length_metrics(valid) | _reply_metrics(valid) | _end_metrics(trajectories) | _environment_metrics(valid)
    found["reward/unplaced_turns"] = float(num_unplaced_rewards(valid))
    scores = reward_metrics(groups)
    found |= {f"reward/{key}": value for key, value in scores.items()}
    found |= named_reward_metrics(valid)
    sources = by_source(groups)
    if len(sources) > 1:
        for source, members in sources.items():
            found |= {f"reward/{source}/{k}": v for k, v in reward_metrics(members).items() if k == "avg_raw_reward"}
    return found


def by_source(groups: list[Group]) -> dict[str, list[Group]]:
    """Return the groups of each data source; a source's name is one part of a metric's name."""
    sources: dict[str, list[Group]] = {}
    for group in groups:
        sources.setdefault(_file_name(group.prompt.data_source), []).append(group)
    return sources


def eval_metrics(groups: list[Group]) -> Metrics:
    """Return `eval/{data_source}/avg_score, pass_at_n, mean_positive_reward`, the same and more under `eval/all/`."""
    found: Metrics = {}
    for source, members in [*by_source(groups).items(), ("all", groups)]:
        for key, value in reward_metrics(members).items():
            found[f"eval/{source}/{_EVAL_NAMES.get(key, key.removeprefix('avg_'))}"] = value
    everything = {k: v for k, v in rollout_metrics(groups).items() if not k.startswith("reward/")}
    return found | {f"eval/all/{key}": value for key, value in everything.items()}


_EVAL_NAMES = {"avg_raw_reward": "avg_score", "mean_positive_reward": "mean_positive_reward"}


def reward_metrics(groups: list[Group]) -> Metrics:
    """Return the rewards of the episodes that the environment did not break, without prompts whose episodes all broke.

    avg_pass_at_n: share of prompts with an episode of positive reward, n = the most episodes a prompt was given.
    mean_positive_reward: an episode's positive turn rewards summed, the mean over episodes.
    """
    sets = [[t for t in group.trajectories if t.end is not EpisodeEnd.ENV_FAILURE] for group in groups]
    sets = [members for members in sets if members]
    if not sets:
        return {}
    episodes = [t for members in sets for t in members]
    n = max(len(group.trajectories) for group in groups)
    return {
        f"avg_pass_at_{n}": _mean([float(any(t.reward > 0 for t in members)) for members in sets]),
        "avg_raw_reward": _mean([t.reward for t in episodes]),
        "min_raw_reward": min(t.reward for t in episodes),
        "max_raw_reward": max(t.reward for t in episodes),
        "mean_positive_reward": _mean([sum(max(turn.reward, 0.0) for turn in t.turns) for t in episodes]),
    }


def named_reward_metrics(trajectories: list[Trajectory]) -> Metrics:
    """Return mean and standard deviation of each named reward, before its weight, over the episodes that have it."""
    paid: dict[str, list[float]] = {}
    for trajectory in trajectories:
        for name, reward in trajectory.rewards.items():
            paid.setdefault(name, []).append(reward)
    found: Metrics = {}
    for name, rewards in paid.items():
        mean = _mean(rewards)
        found[f"rewards/{name}/mean"] = mean
        found[f"rewards/{name}/std"] = math.sqrt(_mean([(reward - mean) ** 2 for reward in rewards]))
    return found


def _length_metrics(trajectories: list[Trajectory]) -> Metrics:
    """Return response lengths as SkyRL counts them: all tokens behind the first prompt, observations included."""
    if not trajectories:
        return {}
    lengths = [float(num_response_tokens(t)) for t in trajectories]
    mean = _mean(lengths)
    paid = [length for length, t in zip(lengths, trajectories, strict=True) if t.reward > 0]
    unpaid = [length for length, t in zip(lengths, trajectories, strict=True) if t.reward == 0]
    return {
        "generate/min_num_tokens": min(lengths),
        "generate/max_num_tokens": max(lengths),
        "generate/avg_num_tokens": mean,
        "generate/std_num_tokens": math.sqrt(_mean([(length - mean) ** 2 for length in lengths])),
        "generate/avg_tokens_non_zero_rewards": _mean(paid),
        "generate/avg_tokens_zero_rewards": _mean(unpaid),
        "generate/num_turns": _mean([float(len(t.turns)) for t in trajectories]),
        "generate/avg_episode_seconds": _mean([t.seconds for t in trajectories]),
    }


def _reply_metrics(trajectories: list[Trajectory]) -> Metrics:
    """Return what was wrong with the replies, one of which is a turn.

    cut_reply_share: ended by their length. invalid_action_share: the environment could read no action in them, over
    the episodes whose environment counts that (skyrl_gym.metrics.INVALID_ACTIONS); left out if none does.
    episodes_without_tokens: episodes in which the policy sampled no token, so nothing of them is trained.
    """
    turns = [turn for t in trajectories for turn in t.turns]
    found = {
        "generate/cut_reply_share": _mean([float(turn.stop_reason == "length") for turn in turns]),
        "generate/episodes_without_tokens": float(sum(not any(u.response_ids for u in t.turns) for t in trajectories)),
    }
    counts = [(t.env_metrics.get(INVALID_ACTIONS), len(t.turns)) for t in trajectories]
    known = [(count, num_turns) for count, num_turns in counts if isinstance(count, int | float) and num_turns]
    if known:
        num_invalid = sum(min(float(count), num_turns) for count, num_turns in known)
        found["generate/invalid_action_share"] = num_invalid / sum(num_turns for _, num_turns in known)
    return found


def num_response_tokens(trajectory: Trajectory) -> int:
    """Return SkyRL's response length: the tokens behind the first prompt, observations included."""
    count, row = 0, []
    for turn in trajectory.turns:
        continues = bool(row) and turn.prompt_ids[: len(row)] == row
        count += (len(turn.prompt_ids) - len(row) if continues else 0) + len(turn.response_ids)
        row = turn.prompt_ids + turn.response_ids
    return count


def _end_metrics(trajectories: list[Trajectory]) -> Metrics:
    """Return how the episodes ended, how many there were and what they sampled, failed ones included."""
    counts = {f"generate/end_{end}": float(sum(t.end is end for t in trajectories)) for end in EpisodeEnd}
    return counts | {
        "generate/num_episodes": float(len(trajectories)),
        "generate/num_sampled_tokens": float(sum(len(turn.response_ids) for t in trajectories for turn in t.turns)),
        "generate/env_failures": counts[f"generate/end_{EpisodeEnd.ENV_FAILURE}"],
        "generate/retries": float(sum(t.num_attempts - 1 for t in trajectories)),
        "generate/truncated": counts[f"generate/end_{EpisodeEnd.OUT_OF_TOKENS}"],
    }


def _environment_metrics(trajectories: list[Trajectory]) -> Metrics:
    """Return `environment/<key>`, or `environment/<env_class>/<key>` where several environments were played.

    Where one env_class plays several data sources (OpenEnv's environments), also `environment/<data_source>/<key>`.
    """
    by_env: dict[str, list[dict[str, Any]]] = {}
    for t in trajectories:
        by_env.setdefault(t.prompt.env_class, [])
        if t.env_metrics:
            by_env[t.prompt.env_class].append(t.env_metrics)
    found: Metrics = {}
    for env_class, episodes in by_env.items():
        prefix = "environment" if len(by_env) == 1 else f"environment/{env_class}"
        if episodes:
            found |= {f"{prefix}/{key}": value for key, value in _aggregated(env_class, episodes).items()}
    return found | _source_metrics(trajectories) if len(by_env) == 1 else found


def _source_metrics(trajectories: list[Trajectory]) -> Metrics:
    episodes: dict[str, list[dict[str, Any]]] = {}
    for t in trajectories:
        if t.env_metrics:
            episodes.setdefault(_file_name(t.prompt.data_source), []).append(t.env_metrics)
    if len(episodes) < 2:
        return {}
    env_class = trajectories[0].prompt.env_class
    return {
        f"environment/{source}/{key}": value
        for source, played in episodes.items()
        for key, value in _aggregated(env_class, played).items()
    }


def _aggregated(env_class: str, episodes: list[dict[str, Any]]) -> Metrics:
    """Return what `aggregate_metrics` of the environment's class makes of its episodes, or the means if it raises."""
    if env_class == AGENT:
        return default_aggregate_metrics(episodes)
    outcome = Outcome.of(lambda: checked_metrics(aggregate_for_environment(env_class, episodes)))
    if outcome.error is not None:
        logger.warning(f"{env_class}: aggregate_metrics failed, so means are logged: {words_of(outcome.error)}")
        outcome.value = default_aggregate_metrics(episodes)
    return {key: value for key, value in outcome.value.items() if isinstance(value, int | float)}


def reduce_metrics(parts: Iterable[Metrics]) -> Metrics:
    """Return one dictionary of many: the maximum of `..._max` keys, the minimum of `..._min` keys, else the mean."""
    values: dict[str, list[float]] = {}
    for part in parts:
        for key, value in part.items():
            values.setdefault(key, []).append(value)
    return {key: _reduce(key, numbers) for key, numbers in values.items()}


def _reduce(key: str, numbers: list[float]) -> float:
    if key.endswith("_max"):
        return max(numbers)
    return min(numbers) if key.endswith("_min") else _mean(numbers)


def tokens_per_second(metrics: Metrics) -> float | None:
    """Return the sampled tokens of a step divided by its seconds, or by those of its rollout if the step has none."""
    seconds = metrics.get("timing/step") or metrics.get("timing/generate")
    tokens = metrics.get("generate/num_sampled_tokens")
    return tokens / seconds if tokens is not None and seconds else None


def dump_eval_results(
    export_path: Path | str,
    groups: list[Group],
    metrics: Metrics,
    step: int | None,
    decode: Callable[[list[int]], str],
) -> Path:
    """Write `dumped_evals/global_step_{N}_evals/` (eval_only without a step): a file per data source, and metrics."""
    name = "eval_only" if step is None else f"global_step_{step}_evals"
    path = Path(export_path) / "dumped_evals" / name
    with naming(path), whole_folder(path) as unfinished:
        for group in groups:
            lines = [json.dumps(_eval_line(t, decode), default=str) for t in group.trajectories]
            with (unfinished / f"{_file_name(group.prompt.data_source)}.jsonl").open("a") as file:
                file.writelines(f"{line}\n" for line in lines)
        (unfinished / f"{AGGREGATED}.jsonl").write_text(json.dumps(_to_json(metrics)) + "\n")
    return path


def _eval_line(trajectory: Trajectory, decode: Callable[[list[int]], str]) -> dict[str, Any]:
    turns = trajectory.turns
    prompt_ids = turns[0].prompt_ids if turns else []
    everything = turns[-1].prompt_ids + turns[-1].response_ids if turns else []
    continues = everything[: len(prompt_ids)] == prompt_ids
    return {
        "input_prompt": decode(prompt_ids),
        "output_response": decode(everything[len(prompt_ids) :] if continues else turns[-1].response_ids),
        "score": trajectory.reward,
        "stop_reason": trajectory.stop_reason,
        "env_class": trajectory.prompt.env_class,
        "env_extras": trajectory.prompt.env_extras,
        "data_source": trajectory.prompt.data_source,
    }


class MetricsLog:
    """Writes `metrics.jsonl`: one line per call, handed to the operating system when the call returns.

    Each line also holds `step`, `time` (Unix) and `elapsed_s`: the seconds that the run has worked so far, over all
    its processes, pauses between them left out.
    """

    def __init__(self, run_folder: Path | str) -> None:
        self.path = Path(run_folder) / METRICS
        self.path.parent.mkdir(parents=True, exist_ok=True)
        lines = read_metrics(self.path)
        self._before = lines[-1].get("elapsed_s", 0.0) if lines else 0.0
        self._start = time.monotonic()
        self._file = self.path.open("a", encoding="utf-8")

    @property
    def elapsed_s(self) -> float:
        return self._before + time.monotonic() - self._start

    def log(self, step: int, metrics: Metrics) -> None:
        line = {"step": step, "time": time.time(), "elapsed_s": round(self.elapsed_s, 3), **_to_json(metrics)}
        with naming(self.path):
            self._file.write(json.dumps(line) + "\n")
            self._file.flush()

    def close(self) -> None:
        with naming(self.path):
            self._file.close()


def read_metrics(path: Path | str) -> list[dict[str, Any]]:
    """Return one dictionary per step, in order; lines of one step are merged. An incomplete last line is left out.

    Raises ValueError with the number of a line that is damaged.
    """
    steps: dict[int, dict[str, Any]] = {}
    path = Path(path)
    if not path.exists():
        return []
    for number, line in enumerate(path.read_bytes().splitlines(keepends=True), start=1):
        if not line.endswith(b"\n"):
            continue
        try:
            fields = {key: _NOT_FINITE.get(value, value) for key, value in json.loads(line).items()}
            steps.setdefault(int(fields["step"]), {}).update(fields)
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
            raise ValueError(f"line {number} of {path} is damaged ({error}); remove that line") from error
    return [steps[step] for step in sorted(steps)]


_NOT_FINITE: dict[Any, Any] = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


def _to_json(metrics: Metrics) -> dict[str, Any]:
    """Return plain numbers, and those that JSON cannot hold as "NaN", "Infinity" or "-Infinity"."""
    return {key: _number(value) for key, value in metrics.items()}


def _number(value: Any) -> Any:
    number = value.item() if hasattr(value, "item") else value
    if isinstance(number, float) and not math.isfinite(number):
        return "NaN" if math.isnan(number) else "Infinity" if number > 0 else "-Infinity"
    return number


def _file_name(data_source: str) -> str:
    """Return a data source as part of a metric's or a file's name: SkyRL turns its slashes into underscores."""
    name = printable(data_source).replace("/", "_").replace("\x00", "_") or "unknown"
    if len(name.encode()) <= LONGEST_NAME and name != AGGREGATED:
        return name
    return f"{name.encode()[:LONGEST_NAME].decode(errors='ignore')}_{text_digest(data_source)[:8]}"


def _mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else 0.0
