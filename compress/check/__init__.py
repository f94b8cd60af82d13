"""Accuracy regression between a baseline and a candidate: what is measured are the bytes that ship."""
