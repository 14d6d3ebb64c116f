"""The settings that skyrl_train makes before torch is loaded; each case runs in its own process."""

from __future__ import annotations

import os
import subprocess
import sys

from tests.benchmarks.busy import shares_of_fair

SETTINGS = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "LRU_CACHE_CAPACITY", "ONEDNN_PRIMITIVE_CACHE_CAPACITY")
MANY_SHAPES = """
import os
import torch
weight = torch.zeros(64, 64, dtype=torch.bfloat16)
grown = []
for rows in range(1, 1200):
    torch.nn.functional.linear(torch.zeros(rows, 64, dtype=torch.bfloat16), weight)
    if rows in (300, 1199):
        with open("/proc/self/statm") as pages:  # ru_maxrss begins with what the parent held when it forked
            grown.append(int(pages.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20)
print(grown[1] - grown[0])
"""


def in_a_process(program: str, **variables: str) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if name not in SETTINGS}
    command = [sys.executable, "-c", program]
    return subprocess.run(command, capture_output=True, text=True, timeout=400, check=True, env={**kept, **variables})


def spin_count(**variables: str) -> str:
    """Return the value of GOMP_SPINCOUNT that libgomp reports."""
    said = in_a_process("import skyrl_train, torch", OMP_DISPLAY_ENV="verbose", **variables).stderr
    [line] = {line.strip() for line in said.splitlines() if "GOMP_SPINCOUNT" in line}
    return line.split("'")[1]


def test_waiting_threads_sleep_soon_unless_the_user_says_otherwise() -> None:
    assert spin_count() == "3000"
    assert spin_count(GOMP_SPINCOUNT="77") == "77"
    assert int(spin_count(OMP_WAIT_POLICY="active")) > 1_000_000


def test_memory_does_not_grow_with_the_number_of_shapes_that_were_computed() -> None:
    ours = float(in_a_process("import skyrl_train" + MANY_SHAPES).stdout)
    without = float(in_a_process(MANY_SHAPES).stdout)
    assert ours < 0.25 * without, (ours, without)


def test_a_share_of_fair_is_one_where_a_step_slows_down_as_its_share_of_the_processors_does() -> None:
    seconds = {0: [3.0, 3.0, 9.0], 1: [4.5], 2: [12.0], 4: [9.0]}  # on two cores fair is 4.5, 6 and 9
    assert shares_of_fair(seconds, cores=2) == {1: 1.0, 2: 0.5, 4: 1.0}
