"""Engines for TensorRT, built ahead of time from an exported graph, and what can be proved of them without a GPU.

library.py    finds and loads a builder
profiles.py   the sizes an engine is built for
build.py      the build, in a process of its own: child.py
messages.py   what a builder says, in a model's words
sections.py   how much of an engine file is weights
verify.py     whether what was meant to be quantized still is
"""

ENGINE, LOG = "model.engine", "build.log"  # beside the graph
