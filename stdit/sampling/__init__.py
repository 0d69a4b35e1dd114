"""From noise to clips: plans, solvers, guidance, the pipeline."""
