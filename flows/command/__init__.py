"""The command ``ditflow``: one module for each of its commands."""
