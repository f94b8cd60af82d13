"""What people who live in optimum find us by: its command-line hook and its registry of export configurations."""
