"""Clips in and out: reading and writing video, datasets, the loader, drawn shapes."""
