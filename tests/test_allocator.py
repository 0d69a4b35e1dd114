import subprocess
import sys
import textwrap

import pytest

from stdit.recipes.entry import child_environment

SCRIPT = """
import resource, sys
import torch
from stdit.training.allocator import reuse_freed_memory

if "reuse" in sys.argv:
    print(reuse_freed_memory())

def work():
    tensors = [torch.empty(2 << 20).fill_(1.0) for _ in range(4)]  # 8 MB each

for _ in range(5):
    work()  # the heap grows to its size
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    work()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def _run(*arguments, **environment):
    environment = {**child_environment(), **environment}
    code = [sys.executable, "-c", textwrap.dedent(SCRIPT), *arguments]
    return subprocess.run(code, env=environment, capture_output=True, text=True, check=True).stdout.split()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's allocator")
def test_memory_that_tensors_free_is_used_again_without_page_faults():
    done, after = _run("reuse")
    if done == "False":
        pytest.skip("not glibc, or the environment sets the allocator")
    assert int(after) < 500  # of 82 thousand pages


def test_an_allocator_set_by_the_user_is_left_alone():
    assert _run("reuse", MALLOC_ARENA_MAX="2")[0] == "False"
    assert _run("reuse", GLIBC_TUNABLES="glibc.malloc.arena_max=2")[0] == "False"
