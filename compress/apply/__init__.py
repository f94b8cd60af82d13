"""The main job, recipe to report."""
