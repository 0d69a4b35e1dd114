"""Odd files from strangers (fuzz.py says which)."""

import sys

import pytest
from faults.fuzz import main


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="peaks of memory are measured in a forked process")
def test_odd_files_end_in_the_products_own_errors_soon_and_in_little_memory(capsys):
    assert main(["--files", "3000"]) == 0, capsys.readouterr().out
