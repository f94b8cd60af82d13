"""Hugging Face checkpoint folders, read and written a tensor at a time."""
