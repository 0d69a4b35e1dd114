"""Evaluation of generated clips, and comparisons of training runs."""
