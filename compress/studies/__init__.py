"""What can be done with a model without changing it: run it, inspect it, compare it, survey its experts, measure its parts."""
