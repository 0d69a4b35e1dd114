"""Published weights: read safely, converted exactly, inflated to video."""
