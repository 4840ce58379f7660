"""The estimate of a recipe's cost before it runs."""
