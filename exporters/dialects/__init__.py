"""How the operators of blocks are spelled in ONNX, one file a dialect."""
