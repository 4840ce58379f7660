"""What will go wrong on this machine: a table of checks, and the process that runs them."""
