"""Diffusion processes: how noise is added to data, and the loss of a prediction. They know no network and no file."""
