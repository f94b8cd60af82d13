"""`compress sensitivity`: what each part of a model costs when it alone is quantized."""
