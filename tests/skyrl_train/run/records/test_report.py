"""The report is one safe file, and its numbers are those of the run."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from html.parser import HTMLParser
from typing import Any, cast

import pytest
from rich.console import Console

from skyrl_train.run.metrics import MetricsLog, eval_metrics, rollout_metrics
from skyrl_train.run.progress import RunProgress
from skyrl_train.run.records.charts import MAX_POINTS, Chart, line_chart, nice_ticks, thinned
from skyrl_train.run.records.conversation import MAX_TOKENS, episode_card
from skyrl_train.run.records.episode import episode_record
from skyrl_train.run.records.picked import pick_episodes
from skyrl_train.run.records.report import write_report
from skyrl_train.run.records.run_info import RunInfo, changed_settings, write_run_info
from skyrl_train.run.records.summary import before_and_after, closing_panel, write_summary
from skyrl_train.run.records.tokens import TokenTexts
from skyrl_train.run.records.trajectories import TrajectoryStore, trajectory_files
from skyrl_train.run.run import Run
from skyrl_train.run.tracking import Tracking
from skyrl_train.types import EpisodeEnd
from skyrl_train.visible import escaped, visible
from tests.skyrl_train.run.records.episodes import TOKENIZER, group, prompt, trajectory

EVIL = "<script>alert(1)</script>\x00\x1b[31m\u202e\" onmouseover='x' </style>&amp;"


@pytest.fixture
def run(tmp_path):
    """Two steps and two evaluations; the policy, the environment and the settings all say something evil."""
    store, log = TrajectoryStore(tmp_path, TOKENIZER), MetricsLog(tmp_path)
    log.log(0, eval_metrics([group(trajectory(["x"], [0.25]))]))
    for step, rewards in ((1, [0.0, 0.5]), (2, [1.0, 0.75])):
        played = [trajectory([EVIL], [reward], of=prompt(EVIL), observation=EVIL) for reward in rewards]
        lost = trajectory(["?"], [0.0], of=prompt(EVIL), end=EpisodeEnd.ENV_FAILURE, num_attempts=3, failure=EVIL)
        store.add("train", step, [*played, lost])
        log.log(step, rollout_metrics([group(*played, lost)]) | {"policy/grad_norm": 1.5, "timing/step": 2.0})
    log.log(2, eval_metrics([group(trajectory(["x"], [0.875]))]))
    store.close()
    log.close()
    write_run_info(tmp_path, RunInfo(f"model {EVIL}", "echo_env", total_steps=2, changed={"trainer.seed": [EVIL, 42]}))
    return tmp_path


class Page(HTMLParser):
    """Tags that are open, scripts, event handlers and addresses of a page."""

    void = ("meta", "br", "link", "img", "input")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.scripts = 0
        self.suspects: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.scripts += tag == "script"
        self.suspects += [name for name, _ in attrs if name.startswith("on") or name in ("src", "href")]
        if tag not in self.void:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.suspects += [name for name, _ in attrs if name.startswith("on") or name in ("src", "href")]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_page_is_whole_needs_no_network_and_runs_nothing_of_the_models(run):
    text = write_report(run).read_text(encoding="utf-8")
    page = Page(text)
    assert page.open == []
    assert page.scripts == 1  # ours
    assert page.suspects == []
    assert not re.search(r"url\(|@import", text)
    assert not re.search("[\x00-\x08\x0b-\x1f\u202e]", text)
    assert "default-src 'none'" in text


def test_the_page_says_what_happened(run):
    text = write_report(run).read_text(encoding="utf-8")
    assert "0.250<span class='arrow'> → </span><span class='after'>0.875</span>" in text
    assert "evaluation reward, before and after" in text
    assert "4 retries after an environment failure; 2 episodes lost for good" in text
    assert "finished: 4" in text
    assert "trainer.seed" in text
    assert "Early: step 1" in text
    assert "Late: step 2" in text
    card = r'class="label">([\w, ]+)</span><span class="when">step (\d)</span><span class="reward \w+">([\d.]+)<'
    # Of two episodes the typical one is the lower, which is also the worst: shown once. Of equal ones the first is near
    # the mean, so the early 0 and the late 1 stand for the prompt that changed.
    assert re.findall(card, text) == [
        ("best", "1", "0.5"), ("best, most changed", "2", "1"), ("typical, worst, most changed", "1", "0"),
        ("typical, worst", "2", "0.75"),
    ]  # fmt: skip


def test_the_page_and_the_last_words_say_what_was_in_vain(tmp_path):
    log = MetricsLog(tmp_path)
    for step, idle in ((1, 0), (2, 1), (3, 2)):
        vain = {"data/num_dropped_prompts": 7, "reward/unplaced_turns": 2, "generate/episodes_without_tokens": 3}
        log.log(step, {"trainer/global_step": step, "trainer/steps_without_learning": idle, **vain})
    log.close()
    text = write_report(tmp_path).read_text(encoding="utf-8")
    assert "Nothing could be learned in 2 of 3 steps." in text
    assert "7 prompts are longer than trainer.max_prompt_length and were never played." in text
    assert "6 rewards were paid before the first sampled token" in text
    assert "9 episodes ended before the policy had sampled a token." in text
    console = Console(record=True, width=160)
    console.print(closing_panel(write_summary(tmp_path)))
    assert "nothing could be learned in 2 of them" in console.export_text()


def test_nothing_is_said_of_what_did_not_happen(run):
    text = write_report(run).read_text(encoding="utf-8")
    assert "could be learned" not in text
    assert "never played" not in text
    assert write_summary(run).steps_without_learning == 0


def test_a_report_of_an_empty_folder_is_still_a_page(tmp_path):
    assert Page(write_report(tmp_path).read_text()).open == []


def test_tokens_are_marked_by_who_made_them():
    episode = episode_record(trajectory(["é"], [1.0], question="q"), "train", 1, TokenTexts(TOKENIZER))
    card = episode_card(["best"], 1, episode)
    sampled = " ".join(str(i) for i in episode.segments[1].ids)
    first, second = (f"{logprob:.3f}" for logprob in episode.segments[1].logprobs)
    assert first != second
    assert re.search(r'<i class="" data-d="\d+">q</i>', card)  # given: no logprob
    assert f'<i class="s1" data-d="{sampled}" data-p="{first} {second}">é</i>' in card  # two bytes, one character


def test_a_long_episode_is_cut_in_the_middle_and_says_so():
    long = trajectory(["a" * 5000, "b" * 5000], [0.0, 1.0], question="q", observation="o")
    card = episode_card(["best"], 1, episode_record(long, "train", 1, TokenTexts(TOKENIZER)))
    assert card.count("<i ") == MAX_TOKENS
    assert f"{10_002 - MAX_TOKENS} tokens left out" in card
    assert card.count(">a</i>") == MAX_TOKENS // 2 - 1
    assert card.count(">b</i>") == MAX_TOKENS // 2


@pytest.mark.parametrize(
    ("text", "shown"),
    [("a\x1bb", "a␛b"), ("\u202e", "\\u202e"), ("\ud800", "\\ud800"), ("é日🙂\n\t", "é日🙂\n\t"), ("\x7f", "\\u007f")],
)
def test_nothing_invisible_is_shown_as_it_is(text, shown):
    assert visible(text) == shown
    assert escaped("<&\"'>") == "&lt;&amp;&quot;&#x27;&gt;"


def test_a_chart_leaves_out_what_is_not_finite():
    assert line_chart(Chart("t", [(1, math.nan)])) == ""
    drawn = line_chart(Chart("t", [(1, 1.0), (2, math.inf), (3, 3.0)]))
    assert "nan" not in drawn
    assert "inf" not in drawn
    assert re.search(r'class="line" d="M[\d.]+ [\d.]+ L[\d.]+ [\d.]+"', drawn)


def test_charts_of_one_or_many_points():
    assert 'class="line-dot"' in line_chart(Chart("t", [(1, 0.0)]))
    many = list(range(10_000))
    assert (len(thinned(many)), thinned(many)[0], thinned(many)[-1]) == (MAX_POINTS, 0, 9999)


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [(0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1.0]), (0, 47, [0, 10, 20, 30, 40, 50]), (-3, 2, [-3, -2, -1, 0, 1, 2])],
)
def test_ticks_are_round_numbers(low, high, ticks):
    assert nice_ticks(low, high, 5) == pytest.approx(ticks)


def test_the_summary_adds_up(run):
    write_report(run)
    summary = write_summary(run)
    assert (summary.reward_before, summary.reward_after, summary.reward_of) == (0.25, 0.875, "evaluation")
    assert summary.steps == 2
    assert summary.tokens == 2 * (2 * len(TOKENIZER.encode(EVIL, add_special_tokens=False)) + 1)
    assert (run / "summary.json").exists()
    console = Console(record=True, width=160)
    console.print(closing_panel(summary))
    printed = console.export_text()
    assert "0.250 → 0.875" in printed
    assert f"uv run skyrl view {run}" in printed
    narrow = Console(record=True, width=40)
    narrow.print(closing_panel(summary), soft_wrap=True)
    text = narrow.export_text()
    assert f"uv run skyrl view {run}\n" in text  # in one piece
    box = [line for line in text.splitlines() if line[0] in "╭│╰"]
    assert {len(line) for line in box} == {40}
    assert f"{summary.tokens:,} tokens sampled" in " ".join(line.strip("│ ") for line in box)  # nothing is cut off
    assert str(run / "report.html") in printed
    assert summary.profile is None
    assert "perfetto" not in printed


@pytest.mark.parametrize(
    ("checkpoint", "says"),
    [(None, "none without a checkpoint"), ("/run/global_step_2", "none (skyrl export writes it from the checkpoint)")],
)
def test_the_last_words_name_skyrl_export_only_where_it_has_a_checkpoint(run, checkpoint, says):
    console = Console(record=True, width=160)
    console.print(closing_panel(replace(write_summary(run), checkpoint=checkpoint)))
    assert f"model         {says}\n" in console.export_text()


def test_the_last_words_say_how_to_open_the_newest_profile(run):
    (run / "profile").mkdir()
    for step in (2, 10):
        (run / f"profile/step_{step}.json.gz").touch()
    console = Console(record=True, width=400)
    console.print(closing_panel(write_summary(run)))
    assert f"{run / 'profile/step_10.json.gz'}, one file per step: open it at https://ui.perfetto.dev" in (
        console.export_text()
    )


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        ([{"reward/avg_raw_reward": 0.1}, {"reward/avg_raw_reward": 0.9}], (0.1, 0.9, "training")),
        ([{"eval/all/avg_score": 0.1}, {"reward/avg_raw_reward": 0.9}], (0.9, 0.9, "training")),
        ([{"eval/all/avg_score": 0.3}], (0.3, 0.3, "evaluation")),
        ([], (None, None, "training")),
    ],
)
def test_before_and_after(lines, expected):
    assert before_and_after(lines) == expected


def test_changed_settings():
    assert changed_settings({"a": 1, "b": 2, "c": None}, {"a": 1, "b": 3}) == {"b": [2, 3]}


def test_the_card_of_a_broken_episode_is_as_safe():
    lost = trajectory([EVIL], [0.0], end=EpisodeEnd.ENV_FAILURE, num_attempts=3, failure=EVIL, of=prompt(EVIL))
    card = episode_card([EVIL], 1, episode_record(lost, "train", 1, TokenTexts(TOKENIZER)))
    page = Page(card)
    assert (page.open, page.scripts, page.suspects) == ([], 0, [])
    assert "after 3 attempts: &lt;script&gt;" in card


def test_the_report_of_a_long_run_stays_small(tmp_path):
    store, log = TrajectoryStore(tmp_path, TOKENIZER), MetricsLog(tmp_path)
    for step in range(1, 1001):
        log.log(step, rollout_metrics([group(trajectory(["x"], [1.0]))]) | {"policy/grad_norm": 1.0 + step % 7})
    for step in (1, 1000):
        store.add("train", step, [trajectory(["long " * 4_000], [float(i)]) for i in range(3)])
    store.close()
    log.close()
    assert write_report(tmp_path).stat().st_size < 1_500_000


@pytest.mark.parametrize(("model", "name"), [("/cache/SmolLM2", "SmolLM2"), ("Qwen/Qwen2.5-0.5B", "Qwen/Qwen2.5-0.5B")])
def test_a_folder_is_called_by_its_last_part(model, name):
    assert RunInfo(model).model_name == name


def test_an_interrupted_run_has_the_report_of_its_last_evaluation(tmp_path):
    """The report follows what was kept before it, in the store's thread, and no other step writes one."""
    store, log = TrajectoryStore(tmp_path, TOKENIZER), MetricsLog(tmp_path)
    parts: dict[str, Any] = {"metrics": log, "trajectories": store, "progress": RunProgress(2, plain_lines=False)}
    parts["tracking"] = Tracking("project", "run", [], {}, folder=tmp_path, resumed_at=0)
    others = dict.fromkeys(("start", "config", "contents", "checkpoints", "profile"))
    run = Run(folder=tmp_path, **parts, **cast(Any, others))
    played = group(trajectory(["said in training"], [0.5]))
    run.keep("train", 1, [played])
    run.log(1, rollout_metrics([played]))
    store.flush()
    assert not (tmp_path / "report.html").exists()
    evaluated = group(trajectory(["said when evaluated"], [0.875]))
    run.keep("eval", 2, [evaluated])
    run.log(2, eval_metrics([evaluated]))
    store.flush()
    text = re.sub(r"</?i[^>]*>", "", (tmp_path / "report.html").read_text())
    assert "said in training" in text
    assert "said when evaluated" in text
    (tmp_path / "metrics.jsonl").write_text("damaged\n")
    run.log(3, eval_metrics([evaluated]))
    store.close()  # a report that cannot be written does not end the run


def test_the_episodes_that_changed_the_most_are_those_of_one_prompt(tmp_path):
    store = TrajectoryStore(tmp_path, TOKENIZER)
    rewards = {"a": [[0.0, 0.2], [0.4, 0.4]], "b": [[0.9, 0.1, 0.5], [0.0, 0.0, 0.1]], "c": [[1.0], [0.8]]}
    for step in (0, 1):
        store.add(
            "eval",
            step,
            [trajectory([f"{uid}{step}{r}"], [r], of=prompt(uid)) for uid in rewards for r in rewards[uid][step]],
        )
    store.close()
    picked, damaged = pick_episodes(trajectory_files(tmp_path, "eval"))
    assert damaged == []
    changed = [one for one in picked if "most changed" in one.labels]
    # b: 0.5 -> 0.033, whose nearest are 0.5 and the first 0
    assert [(one.episode.uid, one.step, one.episode.reward, one.is_late) for one in changed] == [
        ("b", 0, 0.5, False), ("b", 1, 0.0, True),
    ]  # fmt: skip
    assert [(one.labels, one.episode.reward) for one in picked if one.step == 0] == [
        (["best"], 1.0), (["typical"], 0.2), (["worst"], 0.0),
        (["most changed"], 0.5),
    ]  # fmt: skip
