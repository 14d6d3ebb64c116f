"""SkyRL's import path `skyrl_train.inference_engines`: what a custom generator needs of an engine, nothing more."""
