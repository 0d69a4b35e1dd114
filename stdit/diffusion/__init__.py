"""Mathematics of diffusion; knows no network. A level is t in [0, 1]: 0 is clean, 1 is noise, whatever the objective."""
