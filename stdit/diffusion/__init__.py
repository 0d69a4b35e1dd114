"""The mathematics of diffusion, independent of the network.

A level is t in [0, 1] for every objective: 0 is clean data, 1 is noise.
"""
