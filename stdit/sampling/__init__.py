"""Sampling: schedules, solvers, guidance, tasks, and the pipeline."""
