"""Decoding, cropping and checking of image files, and image grids."""
