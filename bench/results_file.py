"""The JSON file in which a benchmark keeps its figures, with what they hold for: machine, versions, date."""

import json
import os
import platform
import time
from pathlib import Path
from types import ModuleType
from typing import Any


def write_results(path: Path, libraries: list[ModuleType], **figures: Any) -> None:
    """Write `figures` to `path`, after the date, the machine, and the versions of Python and `libraries`."""
    result = {
        "date": time.strftime("%Y-%m-%d"),
        "machine": {"cpu": cpu_name(), "cores": os.cpu_count(), "system": platform.platform()},
        "versions": {"python": platform.python_version()} | {one.__name__: one.__version__ for one in libraries},
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result | figures, indent=2) + "\n")
    print(f"written to {path}")


def cpu_name() -> str:
    """The processor's name, where the system tells it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.split(": ")[1] for line in lines if line.startswith("model name")), platform.processor())
