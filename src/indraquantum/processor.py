"""The name of this machine's processor."""

from __future__ import annotations

import platform
import subprocess
import sys
from pathlib import Path

CPUINFO = Path("/proc/cpuinfo")


def processor_name() -> str:
    """Return the name of the processor's model; for an ARM processor on Linux, the numbers of its maker and part.

    Raises:
        OSError, subprocess.CalledProcessError: macOS has no `sysctl` that answers.
    """
    if sys.platform == "darwin":
        asked = ["sysctl", "-n", "machdep.cpu.brand_string"]
        return subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip()
    lines = CPUINFO.read_text().splitlines() if CPUINFO.exists() else []
    facts = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in reversed(lines))}
    if model := facts.get("model name") or facts.get("Model"):
        return model
    ids = [f"{name} {facts[name]}" for name in ("CPU implementer", "CPU part") if name in facts]
    return ", ".join([platform.machine(), *ids])
