#!/usr/bin/env bash
# torch 2.13.0: `nohup torchrun ...` does not outlive its terminal. nohup starts a program with SIGHUP ignored, and an
# ordinary Python program keeps it so; torchrun puts a handler of its own in its place, and ends all workers on SIGHUP.
# Seen with torch 2.13.0 (CPU) on Python 3.11, on Linux:
#     after SIGHUP, Python alone under nohup goes on to its end; under torchrun, the worker is ended and torchrun fails
# `setsid`, or tmux, keeps the signal away. Exit status 0 as long as this holds.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install --quiet --disable-pip-version-check torch==2.13.0
cat > work.py <<'PYTHON'
import pathlib
import sys
import time

pathlib.Path(f"{sys.argv[1]}.started").touch()
time.sleep(15)
pathlib.Path(f"{sys.argv[1]}.finished").touch()
PYTHON

# What is started under nohup, and whether it came to its end although its terminal closed.
hang_up() {
  local name=$1
  shift
  nohup "$@" "$name" > "$name.log" 2>&1 &
  local process=$! status=0
  until [ -e "$name.started" ]; do sleep 0.2; done
  kill -HUP "$process"
  wait "$process" || status=$?
  if [ -e "$name.finished" ]; then echo "$name: finished, status $status"; else echo "$name: ended by SIGHUP, status $status"; fi
}

hang_up python venv/bin/python work.py | tee seen
hang_up torchrun venv/bin/torchrun --standalone --nproc-per-node 1 work.py | tee -a seen
diff seen - <<'EXPECTED'
python: finished, status 0
torchrun: ended by SIGHUP, status 1
EXPECTED
