"""The recipe, the shipped data it may name, and where a model comes from."""
