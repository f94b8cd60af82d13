"""Blocks that exporters build graphs from: a builder, and linear, norm, attention, mamba and moe on top of it."""
