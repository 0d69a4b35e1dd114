"""Slow: thousands of odd files in all readers, manifests and configs (see fuzz.py)."""

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="peaks of memory are measured in a forked process")
def test_odd_files_end_in_the_products_own_errors_soon_and_in_little_memory():
    # A process of its own: the script forks, which is safe only before other tests have started threads.
    script = Path(__file__).with_name("fuzz.py")
    done = subprocess.run([sys.executable, script, "--files", "3000"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
