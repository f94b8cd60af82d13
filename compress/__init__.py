"""compress: make hybrid SSM-Transformer-MoE language models small, and check what ships."""

__version__ = "0.1.0"
