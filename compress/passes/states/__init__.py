"""What `state_precision` decides, and the scales it finds."""
