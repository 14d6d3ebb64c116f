"""A key that is not refused is read: somewhere in the source its name stands as an attribute or as a parameter."""

from __future__ import annotations

import ast
from pathlib import Path

from skyrl_train.config import SkyRLConfig
from skyrl_train.config.refused import reason_against
from skyrl_train.config.tree import leaves

SOURCE = Path(__file__).parents[3] / "skyrl_train"
READ_OTHERWISE = {
    "trainer.algorithm.off_policy_correction.token_tis_ratio_clip_high": "objective.py, as {level}_tis_ratio_clip_high",
    "trainer.algorithm.off_policy_correction.sequence_tis_ratio_clip_high": "the same",
    "trainer.algorithm.off_policy_correction.geo_mask_high": "objective.py, as {prefix}_mask_high",
    "trainer.algorithm.off_policy_correction.geo_mask_low": "the same",
    "trainer.algorithm.off_policy_correction.product_mask_high": "the same",
    "trainer.algorithm.off_policy_correction.product_mask_low": "the same",
    "generator.sampling_params.logprobs": "both values that are accepted ask for what the engine always does",
    "generator.eval_sampling_params.logprobs": "the same",
    "trainer.logger": "as TrainerConfig.loggers",
    "trainer.placement.policy_num_nodes": "as PlacementConfig.num_ranks",
    "trainer.placement.policy_num_gpus_per_node": "the same",
    "trainer.placement.critic_num_nodes": "its rule: there is nothing that it could differ from the policy's for",
    "trainer.placement.critic_num_gpus_per_node": "the same",
    "trainer.placement.ref_num_nodes": "the same",
    "trainer.placement.ref_num_gpus_per_node": "the same",
    "environment.env_classes": "as EnvironmentConfig.trusts",
    "environment.trust_dataset_code": "the same",
    "generator.batched": "its rule; the torch engine always plays all prompts at once",
}


def names_read() -> set[str]:
    found: set[str] = set()
    for path in SOURCE.rglob("*.py"):
        if path.parent.name == "config":
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute):
                found.add(node.attr)
            elif isinstance(node, ast.arg):
                found.add(node.arg)
    return found


def test_every_key_that_is_not_refused_is_read():
    names = names_read()
    unread = [
        key
        for key, _ in leaves(SkyRLConfig())
        if reason_against(key) is None
        and key.rpartition(".")[2] not in names
        and key not in READ_OTHERWISE
        and not key.startswith("environment.skyrl_gym.")  # the environments read theirs
    ]
    assert unread == []
