"""One episode as HTML: every token in order, the policy's own coloured by how sure it was."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator

from skyrl_train.run.records.episode import EpisodeRecord, Segment
from skyrl_train.types import EpisodeEnd
from skyrl_train.visible import escaped, shortened

MAX_TOKENS = 1200  # of an episode; of a longer one the middle is left out
SPECIAL = re.compile(r"<\|[^|]*\|>|</?s>|<(?:bos|eos|pad|start_of_turn|end_of_turn)>")  # drawn faintly
ENDS = {
    EpisodeEnd.FINISHED: "finished",
    EpisodeEnd.OUT_OF_TURNS: "out of turns",
    EpisodeEnd.OUT_OF_TOKENS: "out of tokens",
    EpisodeEnd.ENV_FAILURE: "environment failure",
}


def episode_card(labels: list[str], step: int, episode: EpisodeRecord, *, is_late: bool = False) -> str:
    """Return a card with labels, step and reward, then the conversation. The filter of the page goes by the labels."""
    body = "".join(_bubbles(episode))
    if episode.failure:
        attempts = f"after {episode.num_attempts} attempts: " if episode.num_attempts > 1 else ""
        body += f'<p class="failure">{attempts}{escaped(shortened(episode.failure, 300))}</p>'
    named = "".join(f" · {escaped(name)} {reward:.3g}" for name, reward in episode.rewards.items())
    when = "late" if is_late else "early"
    return (
        f'<article class="episode {when}" data-labels="{escaped("|".join(labels))}"><header>'
        f'<span class="label">{escaped(", ".join(labels))}</span><span class="when">step {step}</span>'
        f'<span class="reward {_mood(episode.reward)}">{episode.reward:.3g}</span>'
        f'<span class="about">prompt {escaped(shortened(episode.uid, 24))} · {len(episode.turns)} '
        f"{'turn' if len(episode.turns) == 1 else 'turns'} · {ENDS[episode.end]}{named}</span></header>{body}</article>"
    )


def _bubbles(episode: EpisodeRecord) -> Iterator[str]:
    """Yield the segments as bubbles, then the environment's messages after the last turn, which have no tokens."""
    dropped = 0
    for segment, kept, num_dropped in _within(episode.segments, MAX_TOKENS):
        dropped += num_dropped
        if kept is None:
            continue
        if dropped:
            yield f'<p class="cut">{dropped} tokens left out</p>'
            dropped = 0
        yield _bubble(episode, segment, kept)
    if dropped:
        yield f'<p class="cut">{dropped} tokens left out</p>'
    for message in episode.turns[-1].observation if episode.turns else []:
        words = escaped(shortened(str(message.get("content", "")), 2000))
        who = '<div class="who">environment, at the end</div>'
        yield f'<div class="bubble given">{who}<div class="said">{words}</div></div>'


def _within(segments: list[Segment], limit: int) -> Iterator[tuple[Segment, range | None, int]]:
    """Yield each segment, the range of its tokens to show, and how many tokens before that range are dropped."""
    total = sum(len(s.ids) for s in segments)
    cut = range(limit // 2, total - limit // 2) if total > limit else range(0)
    start = 0
    for segment in segments:
        end = start + len(segment.ids)
        low, high = max(cut.start, start), min(cut.stop, end)
        if low >= high:
            yield segment, range(end - start), 0
        else:
            if low > start:
                yield segment, range(low - start), 0
            if high < end:
                yield segment, range(high - start, end - start), high - low
            else:
                yield segment, None, high - low
        start = end


def _bubble(episode: EpisodeRecord, segment: Segment, kept: range) -> str:
    if segment.sampled:
        turn = episode.turns[segment.turn]
        who = f"policy, turn {segment.turn + 1}"
        paid = f'<span class="reward {_mood(turn.reward)}">{turn.reward:+.3g}</span>'
        stopped = ' <span class="stop">cut by length</span>' if turn.stop_reason == "length" else ""
    else:
        edited = segment.new_history and segment.turn > 0
        who = "history, edited" if edited else "prompt" if segment.turn == 0 else "environment"
        paid = stopped = ""
    tokens = "".join(_tokens(segment, kept))
    kind = "sampled" if segment.sampled else "given"
    return (
        f'<div class="bubble {kind}"><div class="who">{who}{stopped}{paid}</div><div class="said">{tokens}</div></div>'
    )


def _tokens(segment: Segment, kept: range) -> Iterator[str]:
    """Yield an `<i>` per token, or per character made of several tokens. d = id, p = logprob, for the hover text."""
    waiting: list[int] = []
    for i in kept:
        waiting.append(i)
        if segment.texts[i] == "" and i != kept[-1]:
            continue
        ids = " ".join(str(segment.ids[j]) for j in waiting)
        text = escaped(segment.texts[i][:200])
        special = " x" if SPECIAL.fullmatch(segment.texts[i]) else ""
        if segment.sampled:
            logprobs = [segment.logprobs[j] for j in waiting]
            numbers = " ".join(f"{value:.3f}" for value in logprobs)
            yield f'<i class="s{_surprise(min(logprobs))}{special}" data-d="{ids}" data-p="{numbers}">{text}</i>'
        else:
            yield f'<i class="{special.strip()}" data-d="{ids}">{text}</i>'
        waiting = []


def _surprise(logprob: float) -> int:
    """Return the shade of a sampled token: 0 (at least 90% sure) to 4 (less than 5%)."""
    if math.isnan(logprob):
        return 4
    return sum(logprob < math.log(bound) for bound in (0.9, 0.6, 0.25, 0.05))


def _mood(reward: float) -> str:
    return "good" if reward > 0 else "bad" if reward < 0 else "zero"
