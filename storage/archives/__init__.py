"""Archives of labelled images. Each is read in place, without unpacking it to a disk."""
