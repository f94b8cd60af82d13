"""What `prune_experts` is made of: scores, the search for experts a layer can spare, merging, rescaling, recovery."""
