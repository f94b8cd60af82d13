"""In the place of `python -P -m compress` and `python -m pip`: notes the arguments, and leaves figures as compress would. For all
else it is python itself."""

import json
import os
import sys
from pathlib import Path

arguments = sys.argv[4:] if sys.argv[1] == "-P" else sys.argv[3:]
if sys.argv[1:3] != ["-m", "pip"] and sys.argv[1:4] != ["-P", "-m", "compress"]:
    os.execv(sys.executable, [sys.executable, *sys.argv[1:]])

Path("arguments.json").write_text(json.dumps(arguments))
if sys.argv[2] == "pip":
    sys.exit()
if code := int(os.environ.get("STAND_IN_EXITS", 0)):
    sys.exit(code)
if "--json" in arguments:
    figures = Path(arguments[arguments.index("--json") + 1])
else:
    figures = Path(arguments[arguments.index("--output") + 1]) / "report.json"
    figures.parent.mkdir(parents=True, exist_ok=True)
figures.write_text(json.dumps({"verdict": "undecided"}))
