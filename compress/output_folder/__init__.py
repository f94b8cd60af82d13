"""The folder that `apply` writes: where it goes, who holds it, what is done, and whether it is still what was written."""
