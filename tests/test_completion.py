import shutil
import subprocess

import pytest

from stdit.recipes import completion
from stdit.recipes.cli import COMMANDS


def _complete(*words, folder="."):
    """What bash completes the last of some words to."""
    script = completion.script("bash", ["quickstart", "video"])
    typed = " ".join(f'"{word}"' for word in words)
    code = f'{script}\nCOMP_WORDS=({typed}); COMP_CWORD={len(words) - 1}; _stdit; printf "%s\\n" "${{COMPREPLY[@]}}"'
    return subprocess.run(["bash", "-c", code], capture_output=True, text=True, check=True, cwd=folder).stdout.split()


@pytest.mark.skipif(shutil.which("bash") is None, reason="bash is not installed")
def test_bash_completes_commands_options_configs_and_models(tmp_path):
    assert _complete("stdit", "eval") == ["evaluate", "evaluate-world", "evaluate-tasks"]
    assert _complete("stdit", "train", "--d") == ["--data"]
    assert "--solver" in _complete("stdit", "sample", "--")
    assert _complete("stdit", "train", "qui", folder=tmp_path) == ["quickstart"]
    (tmp_path / "models/shapes").mkdir(parents=True)
    assert "models/shapes" in _complete("stdit", "sample", "--model", "mod", folder=tmp_path)


@pytest.mark.parametrize("shell", completion.SHELLS)
def test_every_command_and_each_of_its_options_are_in_every_script(shell):
    script = completion.script(shell, [])
    for name in COMMANDS:
        assert name in script
        for option in completion.options_of(name):
            assert (option if shell != "fish" else f"-l {option[2:]}") in script
    assert len(completion.options_of("sample")) > 20
