"""SkyRL's import path `skyrl_train.utils`: the names that its users' mains import. Nothing is defined here."""

from skyrl_train.cluster.start import initialize_ray
from skyrl_train.config import validate_cfg
from skyrl_train.left_out import getter_of
from skyrl_train.utils.timer import Timer

__all__ = ["Timer", "initialize_ray", "validate_cfg"]

__getattr__ = getter_of(__name__)
