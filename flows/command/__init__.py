"""The command ``ditflow``: one module a command."""
