"""The kinds of blocks, one file each: tensors, states, levels, folds and arithmetic."""
