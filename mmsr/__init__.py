"""mmsr: MMSearch-R1 from scratch — GRPO that teaches a vision-language model when to search."""

import sys

# Every program imports this first. It has to be readable for an older Python, which would stumble over what follows.
if sys.version_info < (3, 11):
    print(f"mmsr needs Python 3.11 or newer, and this is {sys.version.split()[0]}", file=sys.stderr)
    raise SystemExit(2)
if sys.platform == "win32":
    print("mmsr runs on Linux and macOS; on Windows use WSL: https://learn.microsoft.com/windows/wsl", file=sys.stderr)
    raise SystemExit(2)
