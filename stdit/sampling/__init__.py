"""From noise to clips: schedules, solvers, guidance, the pipeline."""
