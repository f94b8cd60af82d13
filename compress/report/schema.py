"""Values of report.json, schema 1 of the contract."""

from typing import Any

Report = dict[str, Any]  # the whole, or an object in it
