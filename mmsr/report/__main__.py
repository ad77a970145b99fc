"""`python -m mmsr.report RUN…`: see html.py."""

import sys

from mmsr.report.html import main

if __name__ == "__main__":
    main(sys.argv[1:])
