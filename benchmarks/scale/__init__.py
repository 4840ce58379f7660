"""ImageNet's size, rehearsed with tiny images: what each stage takes, and what it would take if it grew."""
