"""The forms that labelled images come in, each read where it lies and none unpacked."""
