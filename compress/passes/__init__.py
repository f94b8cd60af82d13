"""Transformations of a model's layers. A pass is one file named by its recipe key; it defines

- `Options`: a `Strict` pydantic model, the pass's block in the recipe;
- `requires(options, model)`: raises InputError for what can be refused before any weight is read;
- `apply(options, unit, context)`: returns the unit with its weights replaced, lazily: nothing is computed until a
  weight is loaded, and format and shape are known before that (which is how sizes are predicted);
- `details(options, units)`: what the report says about it, given the units as they are stored.
"""
