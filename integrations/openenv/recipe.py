"""The settings of `skyrl train --env ENV` and run_openenv.sh: data set, model, run folder, what a small model needs.

keys of the recipe, then the user's: a later one replaces an earlier one.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from integrations.openenv.catalog import CATALOG, CatalogEntry, catalog_entry
from integrations.openenv.client.background import run_in_background
from integrations.openenv.pool.server_pool import close_shared_pools
from integrations.openenv.prepare_dummy_dataset import (
    MADE_FOR,
    NUM_TRAIN,
    NUM_VALIDATION,
    SEED,
    dataset_rows,
    write_parquet,
)
from skyrl_train.commands.train import parser
from skyrl_train.files import user_path

TRAIN, VALIDATION = "train.parquet", "validation.parquet"
WHOLE_GAME = ("environment.openenv.max_invalid_actions=0", "trainer.policy.optimizer_config.lr=2e-5")
OF_ENVIRONMENTS: dict[str, tuple[str, ...]] = {  # turns, tokens of a history, tokens of a reply, and other settings
    "echo_env": ("generator.sampling_params.max_generate_length=24",),
    "coding_env": ("generator.sampling_params.max_generate_length=32",),
    # Catch: nine moves; the first reply that is no move ends the episode.
    "openspiel_env": (
        "generator.max_turns=12",
        "generator.max_input_length=1024",
        "generator.sampling_params.max_generate_length=12",
        *WHOLE_GAME,
    ),
    # Twelve turns of about 30 tokens, 50 where the action cannot be read.
    "atari_env": (
        "generator.max_turns=12",
        "generator.max_input_length=1024",
        "generator.sampling_params.max_generate_length=12",
    ),
    # Eight decisions; the first reply that names no road ends the episode.
    "sumo_rl_env": (
        "generator.max_turns=8",
        "generator.max_input_length=1024",
        "generator.sampling_params.max_generate_length=12",
        *WHOLE_GAME,
    ),
    # Eight turns of about 95 tokens behind a prompt of 230.
    "finrl_env": (
        "generator.max_turns=8",
        "generator.max_input_length=1280",
        "generator.sampling_params.max_generate_length=16",
        "environment.openenv.max_invalid_actions=0",
    ),
}
# Ten turns of unknown length; if moves cost, a reply without an action must cost more.
OUTSIDE_THE_CATALOG = (
    "generator.max_turns=10",
    "generator.max_input_length=1536",
    "generator.sampling_params.max_generate_length=64",
    "environment.openenv.invalid_action_penalty=1",
)


def with_recipe(words: Sequence[str]) -> list[str]:
    """Return the configuration's keys for a command line: those of the recipe first, where it has --env.

    The data set is made if it is missing. ValueError for an environment, or a data set, that is something else.
    """
    options = parser().parse_intermixed_args(list(words))
    if options.env is None:
        return list(words)
    entry, keys = catalog_entry(options.env), list(options.keys)
    num_gpus = _num_gpus(keys) if options.gpus is None else options.gpus
    if num_gpus < 0:
        raise ValueError(f"--gpus={num_gpus} must not be negative")
    on_cpu = (value_of("trainer.device", keys) or ("cuda" if num_gpus else "cpu")) == "cpu"
    folder = data_folder(entry, options.data_dir)
    if any(value_of(key, keys) is None for key in ("data.train_data", "data.val_data")):
        make_data_set(entry, folder)
    return [*recipe(entry, folder, num_gpus, on_cpu=on_cpu), *keys]


def recipe(entry: CatalogEntry, folder: Path, num_gpus: int, *, on_cpu: bool) -> list[str]:
    """Return the keys for an environment. What a small model needs to learn these tasks in minutes; the rest stays."""
    prompts = max(4, num_gpus)  # a prompt's episodes stay on one rank
    keys = [
        f"data.train_data=[{quoted(folder / TRAIN)}]",
        f"data.val_data=[{quoted(folder / VALIDATION)}]",
        "trainer.policy.model.path=auto",
        f"trainer.ckpt_path={quoted(Path('~/ckpts/openenv').expanduser() / entry.data_name)}",
        "trainer.export_path='${trainer.ckpt_path}/exports'",
        f"trainer.device={'cpu' if on_cpu else 'cuda'}",
        "environment.env_class=openenv",
        f"trainer.train_batch_size={prompts}",
        f"trainer.policy_mini_batch_size={prompts}",
        "generator.n_samples_per_prompt=8",
        "trainer.policy.optimizer_config.lr=1e-5",
        "trainer.algorithm.use_kl_loss=false",
        "trainer.eval_interval=5",
        "trainer.max_ckpts_to_keep=1",
    ]
    if on_cpu:  # on a GPU the memory plan decides both
        keys += [
            "trainer.gradient_checkpointing=false",
            f"trainer.max_tokens_per_microbatch={tokens_of_a_pass(num_gpus)}",
        ]
    if num_gpus > 1:  # a learner rank and an engine on each device; they take turns
        keys += [
            "trainer.strategy=fsdp2",
            f"trainer.placement.policy_num_gpus_per_node={num_gpus}",
            f"generator.num_inference_engines={num_gpus}",
        ]
    if entry.name in CATALOG:
        return [*keys, *OF_ENVIRONMENTS.get(entry.name, ())]
    return [*keys, *OUTSIDE_THE_CATALOG, f"environment.openenv.env_names=[{quoted(entry.name)}]"]


def keys_of_evaluation(env: str, data_dir: str | None, keys: Sequence[str]) -> list[str]:
    """Return the keys of an evaluation in an environment, then the user's. The data set is made if it is missing."""
    entry = catalog_entry(env)
    folder = data_folder(entry, data_dir)
    if value_of("data.val_data", keys) is None:
        make_data_set(entry, folder)
    wanted = ("data.val_data", "environment.", "generator.max_", "generator.sampling_params")
    return [key for key in recipe(entry, folder, 0, on_cpu=True) if key.startswith(wanted)] + list(keys)


def tokens_of_a_pass(num_processes: int) -> int:
    """Return 4096 where memory allows: with 135M weights a run holds 3.7 GiB at 2048 and at most 4.8 at 4096.

    The larger passes are about 7% faster.
    """
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return 4096 if memory >= 12_000_000 * 1024 * max(num_processes, 1) else 2048


def data_folder(entry: CatalogEntry, given: str | None = None) -> Path:
    """Return the folder of the data set: the given one, else ~/data/openenv if that is this environment's, else below.

    ValueError if the given one holds the tasks of others.
    """
    if given is None:
        shared = Path("~/data/openenv").expanduser()
        return shared if made_for(shared) == [entry.data_name] else shared / entry.data_name
    folder = user_path(given).absolute()
    names = made_for(folder)
    if names and entry.data_name not in names:
        raise ValueError(
            f"the data set in {folder} holds tasks for {', '.join(names)}, not for {entry.name}; leave the folder out "
            "(DATA_DIR, --data-dir), or name another one: a missing data set is made there"
        )
    return folder


def made_for(folder: Path) -> list[str]:
    """Return the environments that `prepare_dummy_dataset.py` made a folder's tasks for; [] for any other file."""
    from pyarrow import ArrowException
    from pyarrow.parquet import read_schema

    try:
        metadata = read_schema(folder / TRAIN).metadata or {}
    except (OSError, ArrowException):
        return []
    noted = metadata.get(b"made_for", b"").decode(errors="replace")
    return noted.removeprefix(MADE_FOR).split(",") if noted.startswith(MADE_FOR) else []


def make_data_set(entry: CatalogEntry, folder: Path) -> None:
    """Write training and validation tasks into the folder, unless both files are there."""
    if (folder / TRAIN).is_file() and (folder / VALIDATION).is_file():
        return
    try:
        train, validation = dataset_rows(entry.name, NUM_TRAIN, NUM_VALIDATION, SEED)
    finally:
        run_in_background(close_shared_pools())
    write_parquet(train, folder / TRAIN)
    write_parquet(validation, folder / VALIDATION)
    print(f"{entry.name}: {len(train)} training and {len(validation)} validation tasks in {folder}")


def value_of(key: str, keys: Sequence[str]) -> str | None:
    """Return the value that the last `key=value` gives a key; None if there is none."""
    values = [word.partition("=")[2] for word in keys if word.lstrip("+").partition("=")[0] == key]
    return values[-1] if values else None


def _num_gpus(keys: Sequence[str]) -> int:
    if value_of("trainer.device", keys) == "cpu":
        return 0
    import torch

    return int(torch.cuda.is_available())


def quoted(text: object) -> str:
    """Return a text as Hydra's grammar reads it, whatever it holds."""
    return "'" + str(text).replace("\\", "\\\\").replace("'", "\\'") + "'"
