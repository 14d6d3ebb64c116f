"""Write a dataset of made-up tasks: {output_dir}/train.parquet and validation.parquet.

uv run integrations/openenv/prepare_dummy_dataset.py --output_dir ~/data/openenv --env_name echo_env
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from random import Random
from typing import Any

from integrations.openenv.catalog import CATALOG, FORMS, CatalogEntry, Task, catalog_entry
from integrations.openenv.catalog.options import options_from_words
from integrations.openenv.client.background import run_in_background
from integrations.openenv.client.errors import OpenEnvError
from integrations.openenv.config import OpenEnvConfig
from integrations.openenv.pool.server_pool import close_shared_pools, shared_pool
from skyrl_train.config.problems import written
from skyrl_train.console import as_typed, shell_line
from skyrl_train.files import user_path
from skyrl_train.visible import Parser, make_errors_visible, visible

MADE_FOR = "openenv_env_names="  # recipe.py looks for it in the file
NUM_TRAIN, NUM_VALIDATION, SEED = 64, 32, 0  # also of the data set that training makes if it is missing


def main() -> None:
    parser = _parser()
    arguments = parser.parse_args()
    make_errors_visible()
    try:
        names = list(dict.fromkeys(catalog_entry(name).name for name in arguments.env_name or CATALOG))
        options = options_from_words(arguments.option)
        sizes = (arguments.num_train, arguments.num_validation, arguments.seed)
        datasets = [dataset_rows(name, *sizes, options=options) for name in names]
    except (ValueError, OpenEnvError) as refused:  # an unknown name or option, no server, more tasks than there are
        parser.error(visible(str(refused)))
    finally:
        run_in_background(close_shared_pools())
    folder = user_path(arguments.output_dir)
    train = [row for rows, _ in datasets for row in rows]
    validation = [row for _, rows in datasets for row in rows]
    if len(names) > 1:  # one limit for all would not suit each
        for row in (*train, *validation):
            row["max_turns"] = catalog_entry(row["env_name"]).max_turns
    write_parquet(train, folder / "train.parquet")
    write_parquet(validation, folder / "validation.parquet")
    print(f"{', '.join(names)}: {len(train)} training and {len(validation)} validation tasks in {folder}")
    if len(names) > 1:
        print(
            f"several environments in one data set. To train on all of them at once:\n{mixture_command(names, folder)}"
        )
    elif names[0] not in CATALOG:
        print(f"to train, name it in the configuration too: \"environment.openenv.env_names=['{names[0]}']\"")


def mixture_command(names: Sequence[str], folder: Path) -> str:
    """Return the command that trains on a mixture, in one line: the limits of each episode stand in its row."""
    settings = [
        "environment.env_class=openenv",
        written("data.train_data", [str(folder / "train.parquet")]),
        written("data.val_data", [str(folder / "validation.parquet")]),
        "trainer.policy.model.path=auto",
        written("trainer.ckpt_path", str(Path.home() / "ckpts" / "openenv" / "mixture")),
        "trainer.train_batch_size=8",
        "trainer.policy_mini_batch_size=8",
        "generator.n_samples_per_prompt=8",
        "generator.max_input_length=1280",
        "generator.sampling_params.max_generate_length=32",
        "trainer.algorithm.use_kl_loss=false",
        "trainer.policy.optimizer_config.lr=1e-5",
    ]
    foreign = [name for name in names if name not in CATALOG]
    if foreign:
        settings.append(written("environment.openenv.env_names", foreign))
    return as_typed(shell_line(["skyrl", "train", *settings]))


def dataset_rows(
    name: str,
    num_train: int,
    num_validation: int,
    seed: int,
    options: Mapping[str, Any] | None = None,
    config: OpenEnvConfig | None = None,
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return the rows of the training and the validation split, which share no task and no environment seed.

    The same arguments give the same rows, however the environment's name is spelled and wherever its folder is. A
    server outside the catalog is asked for its description; if it is started for that (as `config` says), it runs
    until the pools of the background loop are closed or Python exits.
    """
    entry, num_tasks = catalog_entry(name), num_train + num_validation
    chosen = entry.read_options(options or {})
    if not entry.is_prepared:
        run_in_background(_show_server(entry, chosen, config or OpenEnvConfig(), seed))
    tasks = entry.tasks(Random(f"{entry.seed_name} {seed}"), num_tasks, chosen)
    seeds = Random(f"{entry.seed_name} {seed} seeds").sample(range(2**31), num_tasks)
    numbered = list(zip(tasks, seeds, strict=True))
    splits: dict[str, list[dict[str, Any]]] = {}
    for split, split_tasks in (("train", numbered[num_validation:]), ("validation", numbered[:num_validation])):
        splits[split] = [dataset_row(name, entry.for_split(task, split, chosen), own) for task, own in split_tasks]
        for index, row in enumerate(splits[split]):
            row["extra_info"] |= {"split": split, "index": index}
    return splits["train"], splits["validation"]


async def _show_server(entry: CatalogEntry, options: Any, config: OpenEnvConfig, seed: int) -> None:
    """Let an entry outside the catalog read its server's description. The server keeps running."""
    reset_kwargs = {**entry.reset_kwargs(options), "seed": seed}  # some resets need a seed
    lease = await shared_pool(config).lease(entry.source(options), **reset_kwargs)
    try:
        await entry.prepare(lease)
    finally:
        await lease.release()


def dataset_row(name: str, task: Task, seed: int) -> dict[str, Any]:
    return {
        "prompt": task.prompt,
        "env_class": "openenv",
        "env_name": name,
        "data_source": f"openenv/{catalog_entry(name).data_name}",
        "seed": seed if task.seed is None else task.seed,
        "options": json.dumps(dict(task.options)),  # as text: environments have different options
        "reward_spec": {"method": "rule", "ground_truth": task.ground_truth},
        "extra_info": {"family": task.family, "solution": task.solution},
    }


def task_of_row(row: Mapping[str, Any]) -> Task:
    """Return the Task that `dataset_row` made a row of; the row's `prompt` and `extra_info` may be missing."""
    truth = (row.get("reward_spec") or {}).get("ground_truth")
    if not isinstance(truth, str):
        raise ValueError(
            f"reward_spec.ground_truth={truth!r} must be a string; make the rows with "
            "integrations/openenv/prepare_dummy_dataset.py of this project (SkyRL's rows have no solution)"
        )
    options = row.get("options") or {}
    if isinstance(options, str):
        options = json.loads(options)
    if not isinstance(options, Mapping):
        raise ValueError(f"options={options!r} must be a JSON object: names and values of the environment's options")
    extra_info = row.get("extra_info") or {}
    return Task(
        prompt=row.get("prompt") or [],
        family=extra_info.get("family") or "",
        ground_truth=truth,
        solution=extra_info.get("solution"),
        seed=row.get("seed"),
        options={name: value for name, value in options.items() if value is not None},  # null means not given
    )


def write_parquet(rows: list[dict[str, Any]], path: Path) -> None:
    """Write the file whole or not at all. Its metadata name the environments, which recipe.py reads."""
    import pyarrow
    import pyarrow.parquet

    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{path.name}.{os.getpid()}.unfinished")
    try:
        made_for = MADE_FOR + ",".join(sorted({catalog_entry(row["env_name"]).data_name for row in rows}))
        table = pyarrow.Table.from_pylist(rows).replace_schema_metadata({"made_for": made_for})
        pyarrow.parquet.write_table(table, unfinished)
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def _parser() -> argparse.ArgumentParser:
    parser = Parser(description="Write datasets of made-up tasks for OpenEnv environments.")
    parser.add_argument("--output_dir", default="~/data/openenv", help="where the two files go")
    parser.add_argument(
        "--env_name",
        action="append",
        help=f"{', '.join(CATALOG)}; {FORMS}; given several times, or not at all (the catalog): a mixture",
    )
    parser.add_argument("--num_train", type=_positive, default=NUM_TRAIN)
    parser.add_argument("--num_validation", type=_positive, default=NUM_VALIDATION)
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument(
        "--option", action="append", default=[], metavar="NAME=VALUE", help="of the environment, e.g. game=catch"
    )
    return parser


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} must be at least 1")
    return number


if __name__ == "__main__":
    main()
