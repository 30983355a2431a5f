"""Ctrl-C in a training with workers ends the workers too."""

import os
import signal
import subprocess
import sys

PROGRAM = """
import multiprocessing
import torch
import rightbatch as rb

class Slow(torch.utils.data.Dataset):
    def __len__(self):
        return 10**6
    def __getitem__(self, index):
        return torch.zeros(1000)

loader = rb.BatchLoader(Slow(), rb.BatchPlan(global_batch_size=64, micro_batch_size=64), num_workers=2)
for number, batch in enumerate(loader):
    if number == 3:
        print(*(worker.pid for worker in multiprocessing.active_children()), flush=True)
"""


def is_running(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_an_interrupt_leaves_no_worker_behind():
    heed_interrupts = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # noqa: E731  # a suite in the background ignores them
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=heed_interrupts,  # noqa: PLW1509  # no other thread runs here
    )
    workers = [int(word) for word in process.stdout.readline().split()]
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate()
    assert len(workers) == 2
    assert "KeyboardInterrupt" in errors
    assert not any(is_running(pid) for pid in workers)
