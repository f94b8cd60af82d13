"""The arithmetic of hybrid models as pure functions on float32 tensors. Letters of shapes are those of `model/operators.py`."""
