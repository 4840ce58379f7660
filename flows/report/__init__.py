"""The page of a finished pipeline."""
