"""SkyRL's import path `skyrl_train.utils.utils`: the same names as `skyrl_train.utils`."""

from skyrl_train.left_out import getter_of
from skyrl_train.utils import Timer, initialize_ray, validate_cfg

__all__ = ["Timer", "initialize_ray", "validate_cfg"]

__getattr__ = getter_of("skyrl_train.utils")
