"""Settings of the devices that the policy and its engines are placed on."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from omegaconf import II

from skyrl_train.config.problems import Problem
from skyrl_train.config.section import Section

FOLLOWERS = {
    "critic": "the critic lies on the devices of the policy",
    "ref": "the reference policy lies on the devices of the policy",
}


@dataclass
class PlacementConfig(Section, at="trainer.placement"):
    """The devices of each model. With trainer.device=cpu a process stands for each of them."""

    colocate_all: bool = True  # the policy's devices are the engines', too: they take turns; false: each has its own
    policy_num_nodes: int = 1  # machines of the policy and its engines, of the cluster that RAY_ADDRESS names
    policy_num_gpus_per_node: int = 1  # devices of the policy per machine: one learner rank on each
    critic_num_nodes: int = II("trainer.placement.policy_num_nodes")  # follows the policy's
    critic_num_gpus_per_node: int = II("trainer.placement.policy_num_gpus_per_node")  # follows the policy's
    ref_num_nodes: int = II("trainer.placement.policy_num_nodes")  # follows the policy's
    ref_num_gpus_per_node: int = II("trainer.placement.policy_num_gpus_per_node")  # follows the policy's

    @property
    def num_ranks(self) -> int:
        return self.policy_num_nodes * self.policy_num_gpus_per_node

    def rules(self) -> Iterator[Problem]:
        yield from self.at_least(1, "policy_num_nodes", "policy_num_gpus_per_node")
        for model, reason in FOLLOWERS.items():
            for name in ("num_nodes", "num_gpus_per_node"):
                own, policys = getattr(self, f"{model}_{name}"), getattr(self, f"policy_{name}")
                if own != policys:
                    yield self.problem(
                        f"{model}_{name}",
                        f"cannot differ from trainer.placement.policy_{name}={policys}: {reason}; drop it",
                    )
