"""The recipe, the shipped data it may name, where a model comes from, and what a shell completes of them."""
