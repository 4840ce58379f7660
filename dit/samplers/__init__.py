"""Samplers: generators of states from noise to data. They know no network and no file."""
