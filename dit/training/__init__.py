"""What a training step needs besides the model."""
