"""Other people's weights: read safely, renamed exactly, inflated to video."""
