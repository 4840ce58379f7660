"""The networks in whose spaces images are compared."""
