"""mmsr: MMSearch-R1 from scratch — GRPO that teaches a vision-language model when to search.

Every program imports this before torch. It refuses what mmsr does not run on, and says how the threads of torch's
OpenMP wait for each other, which OpenMP reads only once, when it is loaded. By default a thread that waits keeps its
core busy for milliseconds. Where another program wants that core, the thread that is waited for does not get it: a step
takes ten times as long beside two busy programs. So threads go to sleep after a few microseconds, unless the user's
environment says how they wait.
"""

import os
import sys

# This file has to be readable for an older Python, which would stumble over what follows.
if sys.version_info < (3, 11):
    print(f"mmsr needs Python 3.11 or newer, and this is {sys.version.split()[0]}", file=sys.stderr)
    raise SystemExit(2)
if sys.platform == "win32":
    print("mmsr runs on Linux and macOS; on Windows use WSL: https://learn.microsoft.com/windows/wsl", file=sys.stderr)
    raise SystemExit(2)

if "OMP_WAIT_POLICY" not in os.environ and "GOMP_SPINCOUNT" not in os.environ:
    os.environ["OMP_WAIT_POLICY"] = "PASSIVE"  # LLVM's OpenMP, which torch has on macOS
    os.environ["GOMP_SPINCOUNT"] = "1000"  # GNU's, which torch has on Linux: it looks 1,000 times before it sleeps
