"""One fork server for all tests: its children start with everything imported, so that a kill hits the work itself."""

from __future__ import annotations

import multiprocessing

multiprocessing.get_context("forkserver").set_forkserver_preload(
    [
        "skyrl_train.entrypoints.main_base",
        "skyrl_train.trainer",
        "skyrl_train.policy.pretrained",
        "skyrl_train.engine.torch.engine",
        "transformers.models.auto.tokenization_auto",
        "transformers.models.llama.modeling_llama",
        "transformers.generation.utils",
    ]
)
