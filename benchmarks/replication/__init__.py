"""The papers' claims, tried again on CIFAR-10."""
