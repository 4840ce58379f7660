"""Diffusion processes: what noise does to data and what a prediction is worth. They know no network and no file."""
