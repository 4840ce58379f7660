"""Image files: how they are decoded, cropped, checked and shown."""
