"""What the stages and the report draw: curves, pictures by class, nearest neighbours."""
