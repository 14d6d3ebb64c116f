"""A run while it lasts: its folder is locked, its progress is shown, and everything it makes is kept."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Generator, Iterable
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from loguru import logger
from rich.console import Console

from skyrl_train.config import SkyRLConfig, to_flat_dict
from skyrl_train.config.refused import REFUSED
from skyrl_train.config.tree import defaults_of
from skyrl_train.files import told
from skyrl_train.run.checkpoint import Checkpoints, State
from skyrl_train.run.contents import Contents
from skyrl_train.run.metrics import Metrics, MetricsLog
from skyrl_train.run.progress import RunProgress
from skyrl_train.run.records.profile import Profile
from skyrl_train.run.records.report import write_report
from skyrl_train.run.records.run_info import RunInfo, changed_settings, read_run_info, recorded_start, run_name
from skyrl_train.run.records.summary import Summary, closing_panel, write_summary
from skyrl_train.run.records.trajectories import Phase, TrajectoryStore
from skyrl_train.run.resume import RunStart, order_of_sums, start_run
from skyrl_train.run.run_folder import refuse_inside, run_lock
from skyrl_train.run.tracking import Tracking
from skyrl_train.types import Batch, Group, Prompt, Sample
from skyrl_train.visible import log_to

# A resumed run may differ in these, too, but then it adds up its numbers in another order.
CHANGES_THE_ORDER_OF_SUMS = (
    "trainer.placement", "trainer.strategy", "trainer.policy.fsdp_config", "trainer.ref.fsdp_config",
    "trainer.device", "trainer.max_tokens_per_microbatch", "trainer.micro_train_batch_size_per_gpu",
    "trainer.micro_forward_batch_size_per_gpu",
    "generator.backend", "generator.num_inference_engines", "generator.inference_engine_tensor_parallel_size",
    "generator.inference_engine_pipeline_parallel_size", "generator.inference_engine_data_parallel_size",
    "generator.weight_sync_backend", "generator.gpu_memory_utilization", "generator.enforce_eager",
    "generator.enable_prefix_caching", "generator.engine_init_kwargs",
    "generator.max_num_seqs", "generator.max_num_batched_tokens",
)  # fmt: skip
# A resumed run may differ in these: they change where things go and how long it lasts, not what a step does.
MAY_CHANGE_ON_RESUME = (
    "data.val_data",
    "trainer.ckpt_path", "trainer.export_path", "trainer.resume_mode", "trainer.resume_path",
    "trainer.ckpt_interval", "trainer.max_ckpts_to_keep", "trainer.hf_save_interval", "trainer.epochs",
    "trainer.save_model",
    "trainer.eval_interval", "trainer.eval_before_train", "trainer.eval_batch_size", "trainer.dump_eval_results",
    "trainer.logger", "trainer.profile", "trainer.project_name", "trainer.run_name",
    "trainer.gradient_checkpointing", "trainer.dump_data_batch",
    "generator.eval_sampling_params", "generator.eval_n_samples_per_prompt", "generator.max_env_retries",
    "generator.step_timeout_s", "generator.episode_timeout_s", "environment.openenv",
    "environment.skyrl_gym.max_env_workers", "environment.env_classes", "environment.trust_dataset_code",
    *CHANGES_THE_ORDER_OF_SUMS,
    *REFUSED,  # the checkpoint of an older version names keys that could only have their default
)  # fmt: skip


class RunRefused(RuntimeError):
    """The run cannot start like this; the message says why and what to do."""


@dataclass
class Run:
    """One trainer's hold on `trainer.ckpt_path`."""

    folder: Path
    start: RunStart
    config: dict[str, Any]  # flat
    contents: Contents
    checkpoints: Checkpoints
    metrics: MetricsLog
    trajectories: TrajectoryStore
    tracking: Tracking
    progress: RunProgress
    profile: Profile

    @classmethod
    @contextmanager
    def open(cls, config: SkyRLConfig, tokenizer: Any, info: RunInfo, contents: Contents) -> Generator[Run]:
        """Lock the folder, find where to start, and keep everything until the block ends, on every path.

        contents: what the files that the config names hold (contents.py); a run goes on only with the same.
        Raises RunRefused if the run cannot start like this; nothing in the folder is lost then.
        """
        with ExitStack() as closing:
            try:
                run = cls._opened(config, tokenizer, info, contents, closing)
            except (ValueError, OSError, RuntimeError, ModuleNotFoundError) as error:
                raise RunRefused(told(error)) from error
            for note in run.start.notes:
                logger.info(note)
            yield run

    @classmethod
    def _opened(cls, config: SkyRLConfig, tokenizer: Any, info: RunInfo, contents: Contents, closing: ExitStack) -> Run:
        trainer, folder = config.trainer, Path(config.trainer.ckpt_path)
        flat = to_flat_dict(config)
        refuse_inside(folder)
        require_writable("trainer.ckpt_path", folder)
        closing.enter_context(run_lock(folder))
        dumps = trainer.dump_eval_results and trainer.eval_interval > 0 and bool(config.data.val_data)
        if trainer.hf_save_interval > 0 or dumps or trainer.dump_data_batch:
            require_writable("trainer.export_path", Path(trainer.export_path))
        checkpoints = Checkpoints(folder, trainer.max_ckpts_to_keep)
        start = start_run(checkpoints, trainer.resume_mode, trainer.resume_path, flat, MAY_CHANGE_ON_RESUME, contents)
        notes = order_of_sums(start.state.get("trainer_state", {}).get("config", {}), flat, CHANGES_THE_ORDER_OF_SUMS)
        start = replace(start, notes=(*start.notes, *notes))
        earlier = RunInfo()
        with suppress(ValueError):  # a damaged one is written anew
            earlier = read_run_info(folder)
        info = replace(info, name=trainer.run_name or earlier.name or run_name(info), starts=earlier.starts)
        tracking = Tracking(
            trainer.project_name, info.name, trainer.loggers, flat, folder=folder, resumed_at=start.step
        )
        closing.callback(tracking.close)
        metrics = MetricsLog(folder)
        closing.callback(metrics.close)
        trajectories = TrajectoryStore(folder, tokenizer)
        closing.callback(trajectories.close)
        plain_lines = "console" not in trainer.loggers
        progress = RunProgress(info.total_steps or 0, start.step, plain_lines=plain_lines, console=Console())
        closing.enter_context(progress)
        closing.enter_context(_logs_above_the_bars(progress))
        profile = Profile(folder, enabled=trainer.profile)
        closing.enter_context(recorded_start(folder, info, start.step))
        return cls(folder, start, flat, contents, checkpoints, metrics, trajectories, tracking, progress, profile)

    def keep(self, phase: Phase, step: int, groups: list[Group]) -> None:
        self.trajectories.add(phase, step, [trajectory for group in groups for trajectory in group.trajectories])

    def keep_advantages(self, step: int, samples: list[Sample], batch: Batch) -> None:
        self.trajectories.add_advantages(step, samples, batch)

    def log(self, step: int, metrics: Metrics) -> None:
        """Log a step. After an evaluation the report is written anew, so that an interrupted run has one."""
        self.metrics.log(step, metrics)
        if any(key.startswith("eval/") for key in metrics):
            self.trajectories.then(self._report)
        self.tracking.log(metrics, step, commit=True)
        self.progress.step_done(step, metrics)

    def save_checkpoint(self, step: int, state: State, save_learner: Callable[[Path], None]) -> None:
        """Write a checkpoint, after everything that was recorded of the steps up to this one."""
        self.trajectories.flush()
        state["trainer_state"] |= {"config": self.config, "contents": self.contents}
        self.checkpoints.save(step, state, save_learner)

    def phase(self, name: str, total: int, unit: str) -> Callable[..., None]:
        """Begin a new line of progress. The returned function counts one more, whatever it is called with."""
        self.progress.phase(name, total, unit)
        return lambda *_: self.progress.advance()

    def _report(self) -> None:
        try:
            write_report(self.folder)
        except (ValueError, OSError) as error:
            logger.warning(f"the report of this evaluation was not written: {error}")

    def finish(self) -> Summary:
        """Write report and summary from what is on the disk, and return the summary."""
        self.trajectories.flush()
        write_report(self.folder)
        summary = write_summary(self.folder)
        self.progress.console.print(closing_panel(summary), soft_wrap=True)
        return summary


def require_writable(key: str, folder: Path) -> None:
    """Make the folder. ValueError if nothing can be written into it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise ValueError(f"{key}={folder} cannot be written into ({error.strerror}); give another folder") from error


def environment_of(prompts: Iterable[Prompt]) -> str:
    """Return what the prompts are about: their data sources, and for rows without one their environments."""
    return ", ".join(sorted({str(p.env_extras.get("data_source") or p.env_class) for p in prompts}))


def run_info(config: SkyRLConfig, model: str, environment: str, device: str, total_steps: int) -> RunInfo:
    return RunInfo(
        model=model,
        environment=environment,
        device=device,
        total_steps=total_steps,
        changed=changed_settings(to_flat_dict(config), defaults_of(config)),
    )


@contextmanager
def _logs_above_the_bars(progress: RunProgress) -> Generator[None]:
    log_to(progress.print)
    try:
        yield
    finally:
        log_to(sys.stderr)
