"""A hybrid model as types: weights with roles, blocks, states, families."""
