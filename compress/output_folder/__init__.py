"""The folder that `apply` writes: where it goes, who holds it, what is done, what lies where, and whether it is as it was written."""
