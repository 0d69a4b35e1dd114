"""Print the script with which a shell completes commands, options, names of configs, and models.

eval "$(stdit completion bash)"              (in ~/.bashrc; zsh: the same with zsh, in ~/.zshrc)
stdit completion fish | source               (in ~/.config/fish/config.fish)
"""

import re
from collections.abc import Sequence

from stdit.recipes.cli import COMMANDS, HELP
from stdit.recipes.entry import command, command_parser
from stdit.typed_config import config_folder

SHELLS = ("bash", "zsh", "fish")
_TAKE_CONFIG = ("train", "plan", "cache-latents")  # commands whose first argument is a config

_BASH = """\
_stdit() {{
    local word=${{COMP_WORDS[COMP_CWORD]}} before=${{COMP_WORDS[COMP_CWORD-1]}}
    local options=""
    if [ "$COMP_CWORD" -eq 1 ]; then
        COMPREPLY=($(compgen -W "{commands}" -- "$word"))
        return
    fi
    if [ "$before" = "--model" ]; then
        COMPREPLY=($(compgen -W "$(ls -d models/*/ 2>/dev/null | sed 's:/$::')" -- "$word") $(compgen -d -- "$word"))
        return
    fi
    case "${{COMP_WORDS[1]}}" in
{cases}
    esac
    case "$word" in
        -*) COMPREPLY=($(compgen -W "$options" -- "$word")) ;;
        *) COMPREPLY=($(compgen -f -- "$word"))
           if [ "$COMP_CWORD" -eq 2 ]; then
               case "${{COMP_WORDS[1]}}" in {with_config}) COMPREPLY+=($(compgen -W "{configs}" -- "$word")) ;; esac
           fi ;;
    esac
}}
complete -o filenames -F _stdit stdit
"""


def options_of(name: str) -> list[str]:
    """The long options of a command, as its help lists them."""
    text = (HELP / f"{name}.txt").read_text(encoding="utf-8") if (HELP / f"{name}.txt").is_file() else ""
    return list(dict.fromkeys(re.findall(r"^  (?:-\w, )?(--[a-z][\w-]*)", text, re.MULTILINE)))


def script(shell: str, configs: Sequence[str]) -> str:
    """The script for a shell of `SHELLS`."""
    if shell == "fish":
        lines = ["complete -c stdit -f -n __fish_use_subcommand -a " + _quoted(" ".join(COMMANDS))]
        for name, about in COMMANDS.items():
            lines.append(f"complete -c stdit -f -n __fish_use_subcommand -a {name} -d {_quoted(about)}")
            seen = f"-n '__fish_seen_subcommand_from {name}'"
            lines += [f"complete -c stdit {seen} -l {option[2:]}" for option in options_of(name)]
            if name in _TAKE_CONFIG:
                lines.append(f"complete -c stdit {seen} -a {_quoted(' '.join(configs))}")
        lines.append("complete -c stdit -l model -x -a '(ls -d models/*/ 2>/dev/null)'")
        return "\n".join(lines) + "\n"
    cases = "\n".join(f'        {name}) options="{" ".join(options_of(name))}" ;;' for name in COMMANDS)
    text = _BASH.format(
        commands=" ".join(COMMANDS), cases=cases, configs=" ".join(configs), with_config="|".join(_TAKE_CONFIG)
    )
    return text if shell == "bash" else f"autoload -U +X bashcompinit && bashcompinit\n{text}"


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "\\'") + "'"


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Print the script of a shell."""
    parser = command_parser("completion", __doc__)
    parser.add_argument("shell", choices=SHELLS)
    shell = parser.parse_args(argv).shell
    print(script(shell, sorted(path.stem for path in config_folder().glob("*.yaml"))), end="")
    return 0
