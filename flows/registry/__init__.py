"""Model versions in MLflow: how one is registered, promoted and served."""
