"""`report.html`: what the run reached and what its episodes look like, in one file that needs no network."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from loguru import logger

from skyrl_train.files import write_whole
from skyrl_train.run.metrics import read_metrics, tokens_per_second
from skyrl_train.run.progress import clock
from skyrl_train.run.records.charts import Chart, Point, line_chart, stacked_bars
from skyrl_train.run.records.conversation import ENDS, episode_card
from skyrl_train.run.records.picked import LABELS, pick_episodes
from skyrl_train.run.records.run_info import RunInfo, read_run_info
from skyrl_train.run.records.summary import EVAL_SCORE, TRAIN_REWARD, Summary, num_steps_without_learning, summarise
from skyrl_train.run.records.trajectories import iterate_trajectories, trajectory_files
from skyrl_train.run.run_folder import METRICS, REPORT
from skyrl_train.types import EpisodeEnd
from skyrl_train.visible import escaped, shortened

HERE = Path(__file__).parent
SMALL_CHARTS = (  # title, metric
    ("Policy entropy", "policy/policy_entropy"),
    ("KL to the reference policy", "policy/policy_kl"),
    ("Gradient norm", "policy/grad_norm"),
    ("Tokens per second", "tokens/s"),
    ("Response length, tokens", "generate/avg_num_tokens"),
    ("Turns per episode", "generate/num_turns"),
    ("Engine against learner, |logprob difference|", "policy/rollout_train_logprobs_abs_diff_mean"),
    ("Seconds per step", "timing/step"),
    ("Groups with equal rewards, share", "reward/equal_group_share"),
    ("Unreadable actions, share", "generate/invalid_action_share"),
    ("Replies cut by length, share", "generate/cut_reply_share"),
)
MAX_FAILURES, MAX_FAILURE_FILES, MAX_ENVIRONMENT = 8, 5, 24
NARROW = 356  # a chart's width in a window of 420 pixels, so that its labels are not scaled
Line = dict[str, Any]


def write_report(run_folder: Path | str) -> Path:
    """Write the report from what the folder holds; parts without data are left out."""
    folder = Path(run_folder)
    lines, info, summary = read_metrics(folder / METRICS), read_run_info(folder), summarise(folder)
    sections = [
        _header(info, summary, lines),
        _reward_section(lines),
        _training_section(lines),
        _environment_section(lines),
        _episodes_section(folder),
        _ends_section(folder, lines),
        _settings_section(info),
        f"<footer>Drawn from <code>{METRICS}</code> and <code>trajectories/</code> in the run's folder. "
        "<code>python -m skyrl_train.view FOLDER</code> shows every episode.</footer>",
    ]
    page = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'; "
        "script-src 'unsafe-inline'\">"
        f"<title>{escaped(info.model_name)} on {escaped(info.environment)}</title>"
        f"<style>{(HERE / 'report.css').read_text()}</style></head><body><main>{''.join(sections)}</main>"
        f'<div id="tip"></div><script>{(HERE / "report.js").read_text()}</script></body></html>\n'
    )
    write_whole(folder / REPORT, page.encode())
    return folder / REPORT


def _header(info: RunInfo, summary: Summary, lines: list[Line]) -> str:
    episodes = sum(line.get("generate/num_episodes", 0) for line in lines)
    facts = [("steps", f"{summary.steps}"), ("time", clock(summary.seconds))]
    facts += [("tokens sampled", _count(summary.tokens)), ("training episodes", _count(episodes))]
    reward = ""
    if summary.reward_before is not None and summary.reward_after is not None:
        numbers = (
            f"{summary.reward_before:.3f}<span class='arrow'> → </span>"
            f"<span class='after'>{summary.reward_after:.3f}</span>"
        )
        name = f"{summary.reward_of} reward, before and after"
        reward = f'<div class="card fact first"><b>{numbers}</b><span>{name}</span></div>'
    tiles = "".join(f'<div class="card fact"><b>{value}</b><span>{name}</span></div>' for name, value in facts)
    device = f" · {escaped(info.device)}" if info.device else ""
    return (
        f'<p class="eyebrow">A training run on {escaped(info.environment)}{device}</p>'
        f"<h1>{escaped(info.model_name)}</h1>"
        f'<div class="facts">{reward}{tiles}</div>'
    )


def _reward_section(lines: list[Line]) -> str:
    band = [
        (line["step"], line["reward/min_raw_reward"], line["reward/max_raw_reward"])
        for line in lines
        if "reward/min_raw_reward" in line
    ]
    chart = Chart("Reward per step", _series(lines, TRAIN_REWARD), band, _series(lines, EVAL_SCORE), bounds=(0.0, 0.0))
    drawn = _at_both_widths(line_chart(chart), line_chart(replace(chart, width=NARROW, height=230)))
    if not drawn:
        return ""
    legend = "<span><i></i>training, mean of the step</span>"
    legend += '<span class="k-band"><i></i>worst to best episode</span>' if band else ""
    legend += '<span class="k-dots"><i></i>evaluation</span>' if chart.dots else ""
    named = "".join(_named_reward_cards(lines))
    named = f'<div class="grid-3">{named}</div>' if named else ""
    return f'<h2>Reward</h2><div class="card"><div class="legend">{legend}</div>{drawn}</div>{named}'


def _named_reward_cards(lines: list[Line]) -> Iterator[str]:
    """Yield a chart for each named reward: its mean over the episodes of a step, before its weight."""
    for key in sorted({key for line in lines for key in line if key.startswith("rewards/") and key.endswith("/mean")}):
        name = key.split("/")[1]
        if drawn := line_chart(Chart(name, _series(lines, key), line_name=name, width=340, height=150)):
            yield f'<div class="card"><h3>{escaped(name)}</h3>{drawn}</div>'


def _training_section(lines: list[Line]) -> str:
    lines = [line | {"tokens/s": speed} if (speed := tokens_per_second(line)) else line for line in lines]
    cards = []
    for title, key in SMALL_CHARTS:
        points = _series(lines, key)
        drawn = line_chart(Chart(title, points, line_name=title.lower(), width=340, height=150))
        if drawn and any(value for _, value in points):
            cards.append(f'<div class="card"><h3>{title}</h3>{drawn}</div>')
    words = " ".join(_losses(lines))
    told = f'<p class="soft">{words}</p>' if words else ""
    return f'<h2>How training went</h2>{told}<div class="grid-3">{"".join(cards)}</div>' if cards or told else ""


def _losses(lines: list[Line]) -> Iterator[str]:
    """Yield a sentence for each thing that was played or paid in vain."""
    steps = [line for line in lines if "trainer/global_step" in line]
    if idle := num_steps_without_learning(lines):
        yield f"Nothing could be learned in {idle} of {len(steps)} steps."
    if dropped := max((line.get("data/num_dropped_prompts", 0) for line in steps), default=0):
        yield f"{_count(dropped)} prompts are longer than trainer.max_prompt_length and were never played."
    if unplaced := sum(line.get("reward/unplaced_turns", 0) for line in steps):
        yield f"{_count(unplaced)} rewards were paid before the first sampled token and reached none."
    if empty := sum(line.get("generate/episodes_without_tokens", 0) for line in steps):
        yield f"{_count(empty)} episodes ended before the policy had sampled a token."


def _environment_section(lines: list[Line]) -> str:
    """Return a small chart for each number that the environment measured; dots are evaluations."""
    keys = {key.removeprefix("eval/all/") for line in lines for key in line if "environment/" in key}
    cards = []
    for key in sorted(key for key in keys if key.startswith("environment/"))[:MAX_ENVIRONMENT]:
        name = key.removeprefix("environment/")
        chart = Chart(name, _series(lines, key), (), _series(lines, f"eval/all/{key}"), width=340, height=150)
        if drawn := line_chart(chart):
            cards.append(f'<div class="card"><h3>{escaped(shortened(name, 60))}</h3>{drawn}</div>')
    if not cards:
        return ""
    legend = '<div class="legend"><span><i></i>training</span><span class="k-dots"><i></i>evaluation</span></div>'
    return f'<h2>What the environment measured</h2>{legend}<div class="grid-3">{"".join(cards)}</div>'


def _episodes_section(folder: Path) -> str:
    """Return training's and evaluation's chosen episodes of the first and of the last step, side by side."""
    parts = [
        _episodes_of(phase, title, trajectory_files(folder, phase))
        for phase, title in (("train", "Episodes of training"), ("eval", "Episodes of evaluations"))
    ]
    shades = "".join(f'<i class="s{i}"></i>' for i in range(5))
    legend = (
        f'<div class="legend"><span class="shades">sampled by the policy, sure {shades} surprised</span>'
        "<span>grey: given to it</span><span>hover a token for its id and logprob</span></div>"
    )
    first = next((i for i, part in enumerate(parts) if part), None)
    if first is not None:
        parts[first] = parts[first].replace("</h2>", f"</h2>{legend}", 1)
    return "".join(parts)


def _episodes_of(phase: str, title: str, files: dict[int, Path]) -> str:
    picked, damaged = pick_episodes(files)
    told = ""
    for step, error in damaged:
        logger.warning(f"the report shows no episodes of step {step}: {error}")
        told += f'<p class="soft">No episodes of step {step}: {escaped(str(error))}</p>'
    if not picked:
        return f"<h2>{title}</h2>{told}" if told else ""
    labels = [label for label in LABELS if any(label in one.labels for one in picked)]
    buttons = "".join(
        f'<label><input type="radio" name="pick-{phase}" value="{label}"{" checked" if label == "all" else ""}>'
        f"<span>{label}</span></label>"
        for label in ("all", *labels)
    )
    steps = sorted({one.step for one in picked})
    heads = "".join(
        f'<h3 class="{name.lower()}">{name}: step {step}</h3>'
        for name, step in zip(("Early", "Late"), steps, strict=False)
    )
    cards = "".join(episode_card(one.labels, one.step, one.episode, is_late=one.is_late) for one in picked)
    one_column = " one" if len(steps) == 1 else ""
    return (
        f'<h2>{title}</h2>{told}<fieldset class="pick" aria-label="which episodes">{buttons}</fieldset>'
        f'<div class="episodes{one_column}" data-pick="all">{heads}{cards}</div>'
    )


def _ends_section(folder: Path, lines: list[Line]) -> str:
    steps = [line for line in lines if f"generate/end_{EpisodeEnd.FINISHED}" in line]
    counts = {str(end): [line.get(f"generate/end_{end}", 0) for line in steps] for end in EpisodeEnd}
    sizes = ((860, 170), (NARROW, 170))
    drawn = _at_both_widths(
        *(stacked_bars("How episodes ended", [line["step"] for line in steps], counts, size) for size in sizes)
    )
    if not drawn:
        return ""
    legend = "".join(
        f'<span class="box end-{end}"><i></i>{ENDS[end]}: {_count(sum(counts[end]))}</span>' for end in EpisodeEnd
    )
    failures, retries = (
        int(sum(line.get(f"generate/{key}", 0) for line in steps)) for key in ("env_failures", "retries")
    )
    words = f"{retries} retries after an environment failure; {failures} episodes lost for good, never trained on."
    if not retries and not failures:
        words = "No environment failed."
    listed = "".join(
        f"<tr><td>step {step}</td><td>{escaped(text)}</td></tr>" for step, text in _failures(folder, steps)
    )
    table = f'<table style="margin-top:10px">{listed}</table>' if listed else ""
    return (
        f'<h2>How episodes ended</h2><p class="soft">{words}</p>'
        f'<div class="card"><div class="legend">{legend}</div>{drawn}{table}</div>'
    )


def _failures(folder: Path, steps: list[Line]) -> Iterator[tuple[int, str]]:
    """Yield the step and the text of the first few environment failures."""
    files = trajectory_files(folder, "train")
    with_failures = [line["step"] for line in steps if line.get("generate/env_failures", 0) and line["step"] in files]
    found = 0
    for step in with_failures[:MAX_FAILURE_FILES]:
        try:
            failures = [episode.failure for episode in iterate_trajectories(files[step]) if episode.failure]
        except ValueError as error:
            failures = [str(error)]
        for failure in failures[: MAX_FAILURES - found]:
            found += 1
            yield step, shortened(failure, 300)


def _settings_section(info: RunInfo) -> str:
    if not info.changed:
        return ""
    rows = "".join(
        f"<tr><td>{escaped(key)}</td><td>{_setting(value)}</td><td class='default'>{_setting(default)}</td></tr>"
        for key, (value, default) in sorted(info.changed.items())[:200]
    )
    return (
        '<h2>Settings that differ from the defaults</h2><div class="card"><table>'
        f"<tr><th>setting</th><th>here</th><th>default</th></tr>{rows}</table></div>"
    )


def _at_both_widths(wide: str, narrow: str) -> str:
    """Return a chart for a desk and one for a phone, of which the style sheet shows one: labels keep their size."""
    return f'<div class="on-wide">{wide}</div><div class="on-narrow">{narrow}</div>' if wide else ""


def _setting(value: Any) -> str:
    return escaped(shortened("null" if value is None else str(value), 200))


def _series(lines: list[Line], key: str) -> list[Point]:
    return [(line["step"], line[key]) for line in lines if key in line]


def _count(number: float) -> str:
    return f"{number:,.0f}" if number < 1e6 else f"{number / 1e6:.2f} M"
