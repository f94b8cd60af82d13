"""Transformations of a model's layers. A pass is one file named by its recipe key; it defines

- `Options`: a `Strict` pydantic model, the pass's block in the recipe;
- `requires(options, model)`: raises InputError for what can be refused before any weight is read;
- `apply(options, unit, context)`: returns the unit with its weights replaced, lazily: nothing is computed until a
  weight is loaded, and format and shape are known before that (which is how sizes are predicted);
- `details(options, units, notes)`: what the report says about it, given the units as they are stored and the notes of
  every layer (an empty list where it is not calibrated).

One that looks at calibration data defines two more:

- `needs_calibration(options)`: whether this recipe's block does;
- `calibrate(options, unit, inputs, context)`: like `apply` for one layer or the head, with `inputs`
  (`calibration.UnitInputs`) to see what reaches its matrices; returns the unit and a note for the report.
"""

from types import ModuleType


def needs_calibration(module: ModuleType, options) -> bool:
    return hasattr(module, "needs_calibration") and module.needs_calibration(options)
