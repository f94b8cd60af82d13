"""How each model family is wired from graph blocks. A file is named by its `model_type` and defines `build(...)`."""
