"""Run the default suite as other processors would: instruction sets of torch and oneDNN, and numbers of threads.

    make test-processors                      # all 18, some 5 minutes each on 2 cores
    make test-processors ONLY='avx512-*-4'    # those whose name matches
    python tests/processors.py --only '*-1' tests/test_survival.py

A line for each says what passed and what failed; the whole output lies in build/processors. Instruction sets that this
processor lacks are left out, and the line says so.
"""

from __future__ import annotations

import argparse
import fnmatch
import itertools
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

LEVELS = ("default", "avx2", "avx512")  # ATEN_CPU_CAPABILITY, each holding those before it
ONEDNN = ("AVX2", None)  # ONEDNN_MAX_CPU_ISA
THREADS = (1, 2, 4)
LOGS = Path("build") / "processors"


@dataclass(frozen=True)
class Processor:
    """What a run of the suite believes to run on."""

    level: str
    onednn: str | None
    threads: int

    @property
    def name(self) -> str:
        """As in `avx2-any-4`."""
        return f"{self.level}-{(self.onednn or 'any').lower()}-{self.threads}"

    @property
    def workers(self) -> int:
        """Tests at once: where each has several threads, one (pytest's own process)."""
        return 2 if self.threads == 1 else 0

    def environment(self) -> dict[str, str]:
        """This process's own, with what makes torch, oneDNN and the tests believe it."""
        rest = {name: value for name, value in os.environ.items() if name != "ONEDNN_MAX_CPU_ISA"}
        isa = {"ONEDNN_MAX_CPU_ISA": self.onednn} if self.onednn else {}
        rest["OMP_WAIT_POLICY"] = "passive"  # more threads than cores would wait for each other at full speed
        return rest | isa | {"ATEN_CPU_CAPABILITY": self.level, "INDRA_TEST_THREADS": str(self.threads)}


PROCESSORS = [Processor(*parts) for parts in itertools.product(LEVELS, ONEDNN, THREADS)]


def own_level() -> str:
    """The highest of LEVELS that this processor has."""
    rest = {name: value for name, value in os.environ.items() if name != "ATEN_CPU_CAPABILITY"}
    code = "import torch; print(torch.backends.cpu.get_cpu_capability())"
    said = subprocess.run([sys.executable, "-c", code], env=rest, capture_output=True, text=True, check=True).stdout
    return said.strip().lower() if said.strip().lower() in LEVELS else "default"


def run(processor: Processor, arguments: list[str]) -> bool:
    """Run pytest as on `processor`, say how it went, and return whether all was well."""
    LOGS.mkdir(parents=True, exist_ok=True)
    workers = ["-n", str(processor.workers), "--dist", "loadfile"]
    command = [sys.executable, "-m", "pytest", "-q", "-rfE", "-m", "not slow", *workers, *arguments]
    output = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    done = subprocess.run(command, env=processor.environment(), **output)
    (LOGS / f"{processor.name}.log").write_text(done.stdout, encoding="utf-8")
    lines = done.stdout.splitlines() or [""]
    print(f"{processor.name:<16} {lines[-1].strip('= ')}", flush=True)
    for line in lines:
        if line.startswith(("FAILED ", "ERROR ")):
            print(f"  {line}", flush=True)
    return done.returncode == 0


def main() -> int:
    """Run them one after the other; 1 if a test failed on any, 2 if none has such a name."""
    parser = argparse.ArgumentParser(description="Run the default suite as other processors would.")
    parser.add_argument("--only", default="*", help="names to run, as in 'avx2-*-4'; all by default")
    options, arguments = parser.parse_known_args()
    wanted = [processor for processor in PROCESSORS if fnmatch.fnmatch(processor.name, options.only)]
    if not wanted:
        parser.error(f"--only {options.only}: must match one of {', '.join(p.name for p in PROCESSORS)}")
    own, good = LEVELS.index(own_level()), True
    for processor in wanted:
        if LEVELS.index(processor.level) > own:
            print(f"{processor.name:<16} left out: this processor has no {processor.level}", flush=True)
        else:
            good &= run(processor, arguments)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
