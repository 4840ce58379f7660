"""What a stage tells MLflow and the terminal."""
