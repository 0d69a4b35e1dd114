"""What a user runs: training, sampling, caching, evaluation. Every module has `main(argv) -> int`; `stdit.recipes.cli` lists them."""
