"""Settings of the warm start: conversations that the policy imitates before it learns from rewards."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, fields

from skyrl_train.config.problems import Problem
from skyrl_train.config.section import Section


@dataclass
class SFTConfig(Section, at="trainer.sft"):
    """Supervised fine-tuning before the first step of RL."""

    # warm start (SFT): files or hub names with conversations to imitate first, as messages or prompt and response
    data: list[str] = field(default_factory=list)
    epochs: int = 1  # passes over the conversations
    batch_size: int = 32  # conversations per optimizer step
    lr: float = 1e-5  # learning rate of these steps, constant; the schedule and the moments of RL begin after them

    @property
    def is_on(self) -> bool:
        return bool(self.data)

    def rules(self) -> Iterator[Problem]:
        yield from self.at_least(1, "epochs", "batch_size")
        if self.lr <= 0:
            yield self.problem("lr", "must be above 0")
        for field_ in fields(self):
            value = getattr(self, field_.name)
            if not self.data and field_.name != "data" and value != field_.default:
                yield self.problem(
                    field_.name, "has no effect without trainer.sft.data; drop it, or name conversations"
                )
