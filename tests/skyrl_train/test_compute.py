"""The compute thread: one for the process, the only one in which torch uses several threads."""

from __future__ import annotations

import subprocess
import sys

from skyrl_train import compute

NUMBERS = """
import threading, torch
torch.set_num_threads(3)
from skyrl_train import compute
numbers = [compute.submit(torch.get_num_threads).result(), torch.get_num_threads()]
other = threading.Thread(target=lambda: numbers.append(torch.get_num_threads()))
other.start()
other.join()
print(numbers)
"""


def test_the_compute_thread_takes_all_threads_and_every_other_thread_keeps_one():
    said = subprocess.run([sys.executable, "-c", NUMBERS], capture_output=True, text=True, check=True).stdout
    assert said.strip() == "[3, 1, 1]"


def test_calls_run_one_after_the_other_in_the_order_in_which_they_were_submitted():
    ran: list[int] = []
    for future in [compute.submit(ran.append, number) for number in range(100)]:
        future.result()
    assert ran == list(range(100))
