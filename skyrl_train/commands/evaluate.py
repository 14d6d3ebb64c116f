"""`skyrl eval RUN|MODEL...`: the same evaluation played by several models, in one table, without training."""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from skyrl_train.commands.experiments import RECIPE
from skyrl_train.visible import Parser

if TYPE_CHECKING:
    from skyrl_train.commands.sources import Source

SCORE = "eval/all/avg_score"
COLUMNS = {  # metric -> heading
    SCORE: "reward",
    "eval/all/pass_at_n": "pass@n",
    "eval/all/generate/avg_num_tokens": "tokens",
}


def main(words: list[str]) -> int:
    """Evaluate, print the table, and return 0."""
    options = parser().parse_intermixed_args(words)
    names = [word for word in options.words if "=" not in word or Path(word).exists()]
    keys = [word for word in options.words if word not in names]
    if not names:
        raise ValueError("name at least one run's folder or model")
    from skyrl_train.commands.sources import source
    from skyrl_train.console import lasting_output
    from skyrl_train.policy.pretrained import resolve_model
    from skyrl_train.visible import make_errors_visible

    with lasting_output():
        make_errors_visible()
        sources = [source(name, step=options.step) for name in names]
        if options.before:
            sources = [one for name in names for one in (source(name, before=True), source(name, step=options.step))]
        keys = [f"data.val_data=[{key[5:]}]" if key.startswith("data=") else key for key in keys]
        if options.env is not None:
            keys = import_module(RECIPE).keys_of_evaluation(options.env, options.data_dir, keys)
        for one in sources:
            if one.saved is None:
                resolve_model(one.model)  # a model that there is not is refused before another one plays
        if _shared(sources) is None and not any(key.startswith("data.val_data=") for key in keys):
            raise ValueError("what is to be played? No run of this machine is among them: add --env ENV or data=FILE")
        results = [(one, metrics_of(one, keys, _shared(sources))) for one in sources]
        show(results, as_json=options.json)
    return 0


def parser() -> argparse.ArgumentParser:
    made = Parser(
        prog="skyrl eval",
        description="Play the validation prompts with one or several models, each the same episodes, and compare. "
        "Data, environment and limits are those of the first run that is named, unless --env or data=FILE says "
        "otherwise.",
    )
    made.add_argument(
        "words",
        nargs="+",
        metavar="RUN|MODEL|KEY=VALUE",
        help="runs' folders, models, and settings; data=FILE: prompts",
    )
    made.add_argument("--env", metavar="ENV", help="an OpenEnv environment, as skyrl train --env has it")
    made.add_argument("--data-dir", metavar="FOLDER", help="with --env: where validation.parquet lies")
    made.add_argument("--before", action="store_true", help="also the model that each run began with")
    made.add_argument("--step", type=int, metavar="N", help="the checkpoint of this step; default: the newest")
    made.add_argument("--json", action="store_true", help="print every metric of each model as JSON")
    return made


def metrics_of(one: Source, keys: Sequence[str], shared: Mapping[str, Any] | None) -> dict[str, float]:
    """Return the metrics of an evaluation, as a training run logs them after its steps."""
    from skyrl_train.commands.evaluated import evaluated

    return asyncio.run(evaluated(one, keys, shared).measure())


def show(results: Sequence[tuple[Source, Mapping[str, float]]], *, as_json: bool) -> None:
    """Print the results: a table for people, or a list of {model, step, metrics}."""
    if as_json:
        from skyrl_train.console import print_json

        print_json([{"model": s.named, "step": s.step, "metrics": dict(found)} for s, found in results])
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from skyrl_train.visible import visible

    table = Table()
    table.add_column("model", overflow="fold")
    columns = {key: heading for key, heading in COLUMNS.items() if any(key in found for _, found in results)}
    for heading in columns.values():
        table.add_column(heading, justify="right")
    for one, found in results:
        numbers = [f"{found[key]:.3f}" if key in found else "" for key in columns]
        table.add_row(Text(visible(one.label)), *numbers)
    Console(highlight=False).print(table)


def _shared(sources: Sequence[Source]) -> Mapping[str, Any] | None:
    """Return the settings of the first run, from which data and environment are taken for all."""
    return next((one.settings for one in sources if one.names_environment), None)
