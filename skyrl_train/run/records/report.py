"""`report.html`: what the run reached and what its episodes look like, in one file that needs no network."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from loguru import logger

from skyrl_train.files import write_whole
from skyrl_train.run.metrics import read_metrics, tokens_per_second
from skyrl_train.run.progress import clock
from skyrl_train.run.records.charts import Chart, Point, line_chart, stacked_bars
from skyrl_train.run.records.conversation import ENDS, episode_card
from skyrl_train.run.records.episode import EpisodeRecord
from skyrl_train.run.records.run_info import RunInfo, read_run_info
from skyrl_train.run.records.summary import EVAL_SCORE, TRAIN_REWARD, Summary, summarise
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
)
MAX_FAILURES, MAX_FAILURE_FILES = 8, 5
Line = dict[str, Any]


def write_report(run_folder: Path | str) -> Path:
    """Write the report from what the folder holds; parts without data are left out."""
    folder = Path(run_folder)
    lines, info, summary = read_metrics(folder / METRICS), read_run_info(folder), summarise(folder)
    sections = [
        _header(info, summary, lines),
        _reward_section(lines),
        _training_section(lines),
        _episodes_section(folder),
        _ends_section(folder, lines),
        _settings_section(info),
        f"<footer>Drawn from <code>{METRICS}</code> and <code>trajectories/</code> in the run's folder. "
        "<code>python -m skyrl_train.records show</code> prints any other episode.</footer>",
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
    drawn = line_chart(chart)
    if not drawn:
        return ""
    legend = "<span><i></i>training, mean of the step</span>"
    legend += '<span class="k-band"><i></i>worst to best episode</span>' if band else ""
    legend += '<span class="k-dots"><i></i>evaluation</span>' if chart.dots else ""
    return f'<h2>Reward</h2><div class="card"><div class="legend">{legend}</div>{drawn}</div>'


def _training_section(lines: list[Line]) -> str:
    lines = [line | {"tokens/s": speed} if (speed := tokens_per_second(line)) else line for line in lines]
    cards = []
    for title, key in SMALL_CHARTS:
        points = _series(lines, key)
        drawn = line_chart(Chart(title, points, line_name=title.lower(), width=340, height=150))
        if drawn and any(value for _, value in points):
            cards.append(f'<div class="card"><h3>{title}</h3>{drawn}</div>')
    return f'<h2>How training went</h2><div class="grid-3">{"".join(cards)}</div>' if cards else ""


def _episodes_section(folder: Path) -> str:
    """Best, typical and worst episode of the first and of the last step, side by side."""
    files = trajectory_files(folder, "train") or trajectory_files(folder, "eval")
    if not files:
        return ""
    columns, damaged = [], ""
    for step in dict.fromkeys((min(files), max(files))):
        try:
            columns.append((step, _best_typical_worst(files[step])))
        except ValueError as error:
            logger.warning(f"the report shows no episodes of step {step}: {error}")
            damaged += f'<p class="soft">No episodes of step {step}: {escaped(str(error))}</p>'
    columns = [(step, picked) for step, picked in columns if picked]
    if not columns:
        return f"<h2>Episodes</h2>{damaged}" if damaged else ""
    cells = [f"<h3>{'Early' if i == 0 else 'Late'}: step {step}</h3>" for i, (step, _) in enumerate(columns)]
    for label in ("Best", "Typical", "Worst"):
        cells += [episode_card(label, picked[label]) if label in picked else "<span></span>" for _, picked in columns]
    shades = "".join(f'<i class="s{i}"></i>' for i in range(5))
    legend = (
        f'<div class="legend"><span class="shades">sampled by the policy, sure {shades} surprised</span>'
        "<span>grey: given to it</span><span>hover a token for its id and logprob</span></div>"
    )
    one = " one" if len(columns) == 1 else ""
    return f'<h2>Episodes</h2>{damaged}{legend}<div class="episodes{one}">{"".join(cells)}</div>'


def _best_typical_worst(path: Path) -> dict[str, EpisodeRecord]:
    """By reward; of equal ones the first. Typical is the lower median. Broken episodes are shown only if all broke."""
    index = [(e.reward, i, e.end is EpisodeEnd.ENV_FAILURE) for i, e in enumerate(iterate_trajectories(path))]
    usable = [item for item in index if not item[2]] or index
    if not usable:
        return {}
    ordered = sorted(usable, key=lambda item: (item[0], -item[1]))
    places = {"Best": ordered[-1][1], "Typical": ordered[(len(ordered) - 1) // 2][1], "Worst": ordered[0][1]}
    wanted = {i: e for i, e in enumerate(iterate_trajectories(path)) if i in places.values()}
    shown: dict[str, EpisodeRecord] = {}
    for label, i in places.items():
        if all(wanted[i] is not other for other in shown.values()):
            shown[label] = wanted[i]
    return shown


def _ends_section(folder: Path, lines: list[Line]) -> str:
    steps = [line for line in lines if f"generate/end_{EpisodeEnd.FINISHED}" in line]
    counts = {str(end): [line.get(f"generate/end_{end}", 0) for line in steps] for end in EpisodeEnd}
    drawn = stacked_bars("How episodes ended", [line["step"] for line in steps], counts, (860, 170))
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
    """The first few environment failures, in words."""
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


def _setting(value: Any) -> str:
    return escaped(shortened("null" if value is None else str(value), 200))


def _series(lines: list[Line], key: str) -> list[Point]:
    return [(line["step"], line[key]) for line in lines if key in line]


def _count(number: float) -> str:
    return f"{number:,.0f}" if number < 1e6 else f"{number / 1e6:.2f} M"
