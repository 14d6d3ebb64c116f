"""A user's main as SkyRL's documents write it: an own estimator and environment, Hydra, and a Ray task."""

import hydra
import ray
from omegaconf import DictConfig

from skyrl_gym.envs import register
from skyrl_train.entrypoints.main_base import BasePPOExp, config_dir, validate_cfg
from skyrl_train.utils import initialize_ray
from skyrl_train.utils.ppo_utils import AdvantageEstimatorRegistry


def simple_baseline(token_level_rewards, response_mask, index, **kwargs):
    scores = (token_level_rewards * response_mask).sum(dim=-1, keepdim=True)
    advantages = (scores - scores.mean()) * response_mask
    return advantages, advantages


AdvantageEstimatorRegistry.register("simple_baseline", simple_baseline)


class MyExp(BasePPOExp):
    def extra_metrics(self):
        return {"mine/own_key": float(self.cfg["my"].key)}


@ray.remote(num_cpus=1)
def skyrl_entrypoint(cfg: DictConfig):
    register(id="even_characters", entry_point="tests.fakes:EvenEnv")
    exp = MyExp(cfg)
    exp.run()


@hydra.main(config_path=config_dir, config_name="ppo_base_config", version_base=None)
def main(cfg: DictConfig) -> None:
    validate_cfg(cfg)
    initialize_ray(cfg)
    ray.get(skyrl_entrypoint.remote(cfg))


if __name__ == "__main__":
    main()
