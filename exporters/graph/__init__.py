"""Blocks that exporters build graphs from: a builder, how weights are stored and inputs rounded, and on top of these linear,
norm, embedding table, attention, mamba and moe.
"""
