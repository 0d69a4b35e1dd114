"""Network layers: pure modules that map tensors to tensors on one device and read no files.

Letters in shapes: B batch, T latent frames (after patching in time), S patches per frame, D hidden size,
C channels, H W height and width, p patch volume. Tokens are (B, T, S, D); a condition is (B, T|1, S|1, D).
"""
