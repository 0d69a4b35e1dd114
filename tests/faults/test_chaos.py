"""A run under random faults ends with the weights of the undisturbed one (chaos.py says which faults)."""

import sys

import pytest
from faults.chaos import main


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="loader processes are found in /proc")
def test_a_run_under_random_faults_ends_with_the_weights_of_the_undisturbed_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["--minutes", "2", "--seed", "1"]) == 0
