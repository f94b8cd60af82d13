"""Transformations of a model's layers. A pass is one file named by its recipe key; it defines

- `Options`: a `Strict` pydantic model, the pass's block in the recipe; its `idle()` names keys that change nothing as the
  others stand, which a plan leaves out;
- `requires(options, model)`: raises InputError for what can be refused before any weight is read;
- `apply(options, unit, context)`: returns the unit with its weights replaced, lazily: nothing is computed until a
  weight is loaded, and format and shape are known before that (which is how sizes are predicted);
- `details(options, units, notes)`: what the report says about it, given the units as they are stored and the notes of
  every layer (an empty list where it is not calibrated).

One whose options name roles may define

- `fitted(options, model)`: the options as they apply to this model, which all of the above are then given, and sentences
  on what is different from what they say.

One that looks at calibration data defines two more:

- `needs_calibration(options)`: whether this recipe's block does;
- `calibrate(options, unit, inputs, context)`: like `apply` for one layer or the head, with `inputs`
  (`calibration.UnitInputs`) to see what reaches its matrices; returns the unit and a note for the report.

One that changes which tensors a model has defines

- `restructure(options, model, found)`: the model as it will be, its configuration included; its weights need not load;
- `SCRATCH_STATES`: how many copies of the hidden states it keeps on disk while it works on a layer.

One that must see every layer before it changes the first (to share a budget among them) defines two more:

- `needs_survey(options)`: whether this recipe's block does;
- `survey(options, layers, context)`: looks at all of `layers` (`calibration.layers`) and returns what it found, ready for
  JSON. `restructure` is given it as `found`, `apply` and `calibrate` as `context.found`; it is None before the survey.
"""

from dataclasses import replace
from types import ModuleType


def needs_calibration(module: ModuleType, options) -> bool:
    return hasattr(module, "needs_calibration") and module.needs_calibration(options)


def needs_survey(module: ModuleType, options) -> bool:
    return hasattr(module, "needs_survey") and module.needs_survey(options)


def fitted(module: ModuleType, options, model) -> tuple:
    """A pass's options as they apply to a model, and sentences on what that changes."""
    return module.fitted(options, model) if hasattr(module, "fitted") else (options, ())


def planned(module: ModuleType, options, model, context):
    """The model as a pass will leave it. Nothing is computed; weights that depend on data may not load."""
    if hasattr(module, "restructure"):
        return module.restructure(options, model, context.found)
    return replace(model, units=tuple(module.apply(options, unit, context) for unit in model.units))
