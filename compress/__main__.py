"""`python -m compress`: the command, from the cli.py beside this package, whatever the working folder holds."""

import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

spec = spec_from_file_location("cli", Path(__file__).resolve().parents[1] / "cli.py")
assert spec is not None and spec.loader is not None  # a file of Python has both
sys.modules["cli"] = cli = module_from_spec(spec)
spec.loader.exec_module(cli)
cli.main(prog_name="compress")
