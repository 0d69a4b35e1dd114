"""From data to weights: one pure step, the loop around it, and what survives a kill."""
