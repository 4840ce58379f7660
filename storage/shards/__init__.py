"""Archives to webdataset tars."""
