"""The registry and the built-in environments; the module of each is imported when one is made."""

from skyrl_gym.envs.registration import deregister, make, pprint_registry, register, registry, spec

__all__ = ["deregister", "make", "pprint_registry", "register", "registry", "spec"]

register("aime", "skyrl_gym.envs.aime.env:AIMEEnv")
register("arithmetic", "skyrl_gym.envs.arithmetic.env:ArithmeticEnv")
register("gsm8k", "skyrl_gym.envs.gsm8k.env:GSM8kEnv")
register("gsm8k_multi_turn", "skyrl_gym.envs.gsm8k.multi_turn_env:GSM8kMultiTurnEnv")
register("lcb", "skyrl_gym.envs.lcb.env:LCBEnv")
register("search", "skyrl_gym.envs.search.env:SearchEnv")
register("searchcode", "skyrl_gym.envs.searchcode.env:SearchCodeEnv")
register("single_turn", "skyrl_gym.envs.single_turn:SingleTurnEnv")
register("text2sql", "skyrl_gym.envs.sql.env:SQLEnv")
