"""Running a model: our own forward, onnxruntime, text, and which other runtimes take what is written."""
