"""The page of a finished pipeline, and the scaling of a sweep."""
