"""The findings of `check`: its measurements as a report that says what would make training fail."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from statistics import fmean, median, pstdev
from typing import Literal

from integrations.openenv.commands.measure import Measurements, PlayedEpisode, seeds_differ

MAX_TEXT_CHARS = 8000  # about 2000 tokens a turn: four of them fill a small model's context
SLOW_STEP_MS = 1000.0
SAME = 1e-6
MAX_REFUSAL_CHARS = 300
MIN_EPISODES_TO_JUDGE = 10  # of random play: fewer may all earn the same by chance


@dataclass(frozen=True, slots=True)
class Finding:
    """One finding. fail: training would fail or learn nothing; warn: it works, with this restriction."""

    level: Literal["fail", "warn"]
    words: str


@dataclass(frozen=True, slots=True)
class Returns:
    """Statistics of the rewards that one player's episodes earned."""

    num_episodes: int
    mean: float
    std: float
    low: float
    high: float
    ended: float  # share of episodes that the environment ended
    invalid: float  # share of actions that were refused

    @classmethod
    def of(cls, episodes: list[PlayedEpisode]) -> Returns | None:
        if not episodes:
            return None
        rewards = [episode.reward for episode in episodes]
        num_actions = sum(len(episode.replies) for episode in episodes)
        return cls(
            len(episodes),
            fmean(rewards),
            pstdev(rewards),
            min(rewards),
            max(rewards),
            fmean(episode.ended for episode in episodes),
            sum(episode.num_invalid for episode in episodes) / max(num_actions, 1),
        )


@dataclass(frozen=True, slots=True)
class Report:
    """The result of `check`: statistics and findings."""

    name: str
    action: str
    fields: list[str]
    start_s: float
    random: Returns | None
    gold: Returns | None
    repeats: bool
    tasks_differ: bool
    step_ms_median: float | None
    step_ms_p99: float | None
    num_sessions: int
    longest_text_chars: int
    left_processes: list[int] | None
    left_containers: list[str]
    findings: list[Finding]

    @property
    def passed(self) -> bool:
        return not any(finding.level == "fail" for finding in self.findings)


def report(seen: Measurements) -> Report:
    episodes = [*seen.random, *seen.again, *seen.gold]
    steps_ms = sorted(1000 * seconds for episode in episodes for seconds in episode.step_s)
    findings = [Finding("fail", f"nothing could be played: {seen.failure}")] if seen.failure else [*_findings(seen)]
    return Report(
        name=seen.name,
        action=seen.action,
        fields=seen.fields,
        start_s=seen.start_s,
        random=Returns.of(seen.random),
        gold=Returns.of(seen.gold),
        repeats=not _differences(seen),
        tasks_differ=_tasks_differ(seen),
        step_ms_median=median(steps_ms) if steps_ms else None,
        step_ms_p99=steps_ms[int(0.99 * (len(steps_ms) - 1))] if steps_ms else None,
        num_sessions=seen.num_sessions,
        longest_text_chars=_longest_text(seen),
        left_processes=seen.left_processes,
        left_containers=seen.left_containers,
        findings=findings,
    )


def _findings(seen: Measurements) -> Iterator[Finding]:
    yield from _failure_findings(seen)
    yield from _reward_findings(seen)
    yield from _repetition_findings(seen)
    yield from _text_findings(seen)
    yield from _server_findings(seen)


def _failure_findings(seen: Measurements) -> Iterator[Finding]:
    failures = [episode.failure for episode in (*seen.random, *seen.again, *seen.gold) if episode.failure]
    if failures:
        yield Finding("fail", f"{len(failures)} episodes failed: {failures[0]}")
    if not any(episode.replies for episode in seen.random):
        yield Finding("warn", "no random action is known here, so rewards and repetition were seen with gold only")
    returns = Returns.of(seen.random)
    if returns is not None and returns.invalid > 0.5:
        words = Counter(refusal for episode in seen.random for refusal in episode.refusals).most_common(1)
        said = f"; most often: {words[0][0][:MAX_REFUSAL_CHARS]}" if words else ""
        yield Finding(
            "warn", f"the server refused {returns.invalid:.0%} of the random actions: its schema says little{said}"
        )


def _reward_findings(seen: Measurements) -> Iterator[Finding]:
    random, gold = Returns.of([episode for episode in seen.random if episode.replies]), Returns.of(seen.gold)
    both = [episode.reward for episode in (*seen.random, *seen.gold) if episode.replies]
    promise = next((episode.gold_reward for episode in seen.gold if episode.gold_reward is not None), None)
    if both and max(both) - min(both) < SAME:
        ended = any(episode.ended for episode in (*seen.random, *seen.gold))
        advice = "" if ended else " and none reached its end: allow more with --max-turns, or"
        if ended and not seen.gold and len(both) < MIN_EPISODES_TO_JUDGE:
            yield Finding(
                "warn",
                f"all {len(both)} episodes earned {both[0]:g}, which may be chance: give -n 20 to see whether the "
                "reward varies",
            )
        else:
            yield Finding(
                "fail",
                f"the reward never varies: every episode earned {both[0]:g}{advice or ';'} give option "
                "reward=my_pkg.mod:fn",
            )
    elif random is not None and gold is not None and gold.mean <= random.mean + SAME:
        yield Finding(
            "fail", f"playing well earns no more ({gold.mean:.3g}) than playing at random ({random.mean:.3g})"
        )
    elif random is not None and random.std < SAME:
        yield Finding(
            "warn", f"random play always earns {random.mean:g}: a model that cannot play yet sees no difference"
        )
    if gold is not None and promise is not None and gold.low < promise - SAME:
        yield Finding("fail", f"the gold player earned {gold.low:g} where {promise:g} is promised")
    num_unpaid = _unpaid_now_and_then(seen)
    if num_unpaid:
        yield Finding(
            "warn",
            f"the server paid null in {num_unpaid} turns, but a number in others like them: null counts as 0. "
            "If it computes NaN or infinity there, mend it: JSON has no word for these, so servers write null",
        )
    if gold is None:
        yield Finding("warn", "no gold player is known, so nobody showed here that the task can be solved")


def _repetition_findings(seen: Measurements) -> Iterator[Finding]:
    differences = _differences(seen)
    if differences:
        yield Finding(
            "fail",
            f"the same seed and actions gave different {' and '.join(differences)}: the episodes of a group would "
            "not be about the same task. Does the server's reset take a seed?",
        )
    elif _fields_that_differ(seen):
        yield Finding("warn", f"fields that nobody reads differ between repetitions: {_fields_that_differ(seen)}")
    if len(seen.random) > 1 and not _tasks_differ(seen):
        num_compared = len(seen.elsewhere)
        yield Finding(
            "warn",
            "no two seeds were seen to differ, neither in the first text nor in what came of the same actions "
            f"({num_compared} episodes): if every seed gives the same task, the model learns this one only",
        )


def _text_findings(seen: Measurements) -> Iterator[Finding]:
    if _longest_text(seen) > MAX_TEXT_CHARS:
        yield Finding("fail", f"a turn's text has {_longest_text(seen)} characters; {MAX_TEXT_CHARS} are a lot already")
    firsts = [episode.texts[0] for episode in seen.random if episode.texts]
    if firsts and not any(firsts) and len(set(seen.first_prompts)) == 1 and len(seen.first_prompts) > 1:
        yield Finding("warn", "the first observation is empty and all prompts are equal: nothing says what the task is")
    if seen.random and not any(episode.ended for episode in (*seen.random, *seen.gold)):
        yield Finding("warn", "no episode ended by itself (done): each goes on until generator.max_turns")


def _server_findings(seen: Measurements) -> Iterator[Finding]:
    if seen.num_sessions == 1:
        yield Finding("warn", "the server takes one session at a time: each episode at once needs a server of its own")
    if seen.num_sessions_again < seen.num_sessions:
        lost = seen.num_sessions - seen.num_sessions_again
        yield Finding("fail", f"{lost} of {seen.num_sessions} sessions were not free again after they were closed")
    steps_ms = sorted(1000 * s for episode in seen.random for s in episode.step_s)
    if steps_ms and steps_ms[int(0.99 * (len(steps_ms) - 1))] > SLOW_STEP_MS:
        yield Finding("warn", f"steps are slow: 1 in 100 takes over {SLOW_STEP_MS / 1000:g} s")
    if seen.left_processes:
        yield Finding("fail", f"processes were left running: {', '.join(map(str, seen.left_processes))}")
    if seen.left_containers:
        yield Finding("fail", f"containers were left: {', '.join(seen.left_containers)}")


def _differences(seen: Measurements) -> list[str]:
    """Return which of texts, rewards and ends differed between an episode and its repetition."""
    found = []
    for name in ("texts", "rewards", "ended"):
        if any(getattr(a, name) != getattr(b, name) for a, b in zip(seen.random, seen.again, strict=False)):
            found.append("ends" if name == "ended" else name)
    return found


def _fields_that_differ(seen: Measurements) -> str:
    names = {
        name
        for first, second in zip(seen.random, seen.again, strict=False)
        for a, b in zip(first.observations, second.observations, strict=False)
        for name in a.keys() | b.keys()
        if name != "metadata" and a.get(name) != b.get(name)
    }
    return ", ".join(sorted(names))


def _unpaid_now_and_then(seen: Measurements) -> int:
    """Return the number of turns with a null reward, if other turns of the same kind (last or not last) were paid."""
    last, others = [], []
    for episode in (*seen.random, *seen.gold):
        others += episode.paid[:-1] if episode.ended else episode.paid
        last += episode.paid[-1:] if episode.ended else []
    return sum(kind.count(False) for kind in (last, others) if any(kind))


def _tasks_differ(seen: Measurements) -> bool:
    """Return whether seeds lead to different tasks, by first texts, gold actions, or results of equal actions."""
    if seeds_differ(seen):
        return True
    return any(
        (one.texts, one.rewards, one.ended) != (other.texts, other.rewards, other.ended)
        for one, other in zip(seen.random, seen.elsewhere, strict=False)
    )


def _longest_text(seen: Measurements) -> int:
    return max((len(text) for episode in (*seen.random, *seen.gold) for text in episode.texts), default=0)
