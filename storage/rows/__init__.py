"""Row stores: zarr arrays whose rows are committed, verified and read in blocks."""
