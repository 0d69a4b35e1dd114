"""The commands: training, sampling, caching, evaluation and more.

Every module of a command has `main(argv) -> int`, which returns the exit code; `stdit.recipes.cli` lists the commands.
"""
