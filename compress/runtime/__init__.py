"""Running a model: our own forward, onnxruntime, logits of windows, and which other runtimes take what is written."""
