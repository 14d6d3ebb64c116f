"""Training that stands still: count the steps in a row that learned nothing, then say once why and what to try."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence

from skyrl_train.run.metrics import Metrics

MAX_STEPS = 3  # steps in a row without learning after which the warning is due
TOLD_FROM = 0.01  # a share below this is left out of the warning
HIGH = 0.2  # a share from here on is a likely cause: the warning says what to try against it


class Standstill:
    """Counts the training steps since one last moved the policy.

    A step has learned something if its optimizer steps had a gradient: without trained tokens or with advantages of 0
    the learner reports no `policy/grad_norm`, or 0. One spell without learning gives one warning.
    """

    def __init__(self) -> None:
        self.num_steps = 0
        self._last: deque[Metrics] = deque(maxlen=MAX_STEPS)

    def after(self, metrics: Metrics) -> str | None:
        """Count one step by its metrics. Return the warning if it is the third in a row without learning, else None."""
        if metrics.get("policy/grad_norm", 0.0) > 0.0:
            self.num_steps = 0
            self._last.clear()
            return None
        self.num_steps += 1
        self._last.append(metrics)
        return warning(self._last) if self.num_steps == MAX_STEPS else None


def warning(steps: Sequence[Metrics]) -> str:
    """Return one line for steps that learned nothing: the measured causes, and which settings may help."""
    mean = _means(steps)
    causes, advice = [], []
    for cause, remedy in _findings(mean):
        causes.append(cause)
        advice += [remedy] if remedy else []
    why = "; ".join(causes) or "no optimizer step had a gradient, although the rewards differ"
    tries = "; ".join(advice) or "look at the episodes with `python -m skyrl_train.records show`"
    return f"nothing could be learned for {len(steps)} steps: {why}. Try: {tries}"


def _findings(mean: Callable[[str], float]) -> Iterator[tuple[str, str]]:
    """Yield (cause, what to try against it, or an empty string), the decisive ones first."""
    if mean("generate/num_sampled_tokens") == 0:
        yield (
            "no episode sampled a token",
            "generator.max_input_length must leave room for the first prompt, and generator.sampling_params.min_tokens "
            "of at least 1 keeps replies from being empty",
        )
        return
    yield from _filter_findings(mean)
    yield from _reward_findings(mean)
    if (invalid := mean("generate/invalid_action_share")) >= TOLD_FROM:
        remedy = "show in the prompt how an action is written, with an example" if invalid >= HIGH else ""
        yield f"{invalid:.0%} of actions were unreadable", remedy
    if (cut := mean("generate/cut_reply_share")) >= TOLD_FROM:
        remedy = "a larger generator.sampling_params.max_generate_length, or a prompt that asks for short replies"
        yield f"{cut:.0%} of replies were cut by length", remedy if cut >= HIGH else ""


def _reward_findings(mean: Callable[[str], float]) -> Iterator[tuple[str, str]]:
    equal, advantages = mean("reward/equal_group_share"), mean("loss/avg_raw_advantages_abs")
    if equal >= TOLD_FROM:
        share = "all rewards of each group are equal" if equal == 1 else f"{equal:.0%} of groups have equal rewards"
        yield (
            f"{share} (mean reward {mean('reward/avg_raw_reward'):.3g})",
            "a higher generator.sampling_params.temperature or generator.n_samples_per_prompt, or tasks that the "
            "policy solves now and then",
        )
    elif advantages == 0 and mean("loss/num_trained_tokens") > 0:
        yield "every advantage is 0 although the rewards differ", "another trainer.algorithm.advantage_estimator"
    if (unplaced := mean("reward/unplaced_turns")) > 0:
        yield f"{unplaced:.3g} rewards a step were paid before the first sampled token and reach no token", ""
    failed = mean("generate/env_failures") / max(mean("generate/num_episodes"), 1.0)
    if failed >= TOLD_FROM:
        remedy = "the environment needs repair: see the failures in the log" if failed >= HIGH else ""
        yield f"{failed:.0%} of episodes failed in their environments", remedy


def _filter_findings(mean: Callable[[str], float]) -> Iterator[tuple[str, str]]:
    """Yield what was taken out of the loss after it was sampled, and gradients that were thrown away."""
    if mean("loss/num_trained_tokens") == 0:
        overlong = mean("generate/truncated") / max(mean("generate/num_episodes"), 1.0)
        yield (
            f"no sampled token is left in the loss ({overlong:.0%} of episodes were ended by a length limit)",
            "generator.apply_overlong_filtering=false or longer limits" if overlong >= HIGH else "",
        )
    for name in ("outlier_seq", "geo_sequence_mask", "product_sequence_mask"):
        if (rejected := mean(f"policy/loss_metrics/{name}_masked_ratio")) >= TOLD_FROM:
            yield (
                f"off_policy_correction dropped {rejected:.0%} of samples ({name})",
                "wider bounds in trainer.algorithm.off_policy_correction" if rejected >= HIGH else "",
            )
    if (skipped := mean("policy/num_skipped_steps")) > 0:
        yield (
            f"{skipped:.3g} optimizer steps of each training step had a gradient that is not finite",
            "a lower trainer.policy.optimizer_config.lr",
        )


def _means(steps: Sequence[Metrics]) -> Callable[[str], float]:
    """Return a function: key -> its mean over the steps, where a step without the key counts as 0."""
    return lambda key: sum(step.get(key, 0.0) for step in steps) / len(steps)
