"""The heap of a training process, each in a process of its own: the setting is for a process's whole life."""

import os
import platform
import subprocess
import sys

import pytest

PROGRAM = """
import resource, torch
from glade.train.memory import keep_freed_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(4):
        torch.zeros(48 * 2**18)  # 48 MiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

before, kept = faults(), keep_freed_memory()
faults()
print(kept, before, faults())
"""


def run(**environment: str) -> tuple[bool, int, int]:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=os.environ | environment, check=True, capture_output=True, text=True
    )
    kept, before, after = done.stdout.split()
    return kept == "True", int(before), int(after)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs the GNU C library")
def test_a_freed_block_is_not_faulted_in_again() -> None:
    kept, before, after = run()
    assert kept
    assert after < before / 20


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs the GNU C library")
def test_what_the_user_has_set_stays() -> None:
    kept, before, after = run(MALLOC_MMAP_THRESHOLD_="1048576")
    assert not kept
    assert after > before / 2
