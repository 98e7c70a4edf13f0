#!/usr/bin/env python
"""``dfd report``, under the name that it had before there was that command."""

import sys

from dfd.cli import main

if __name__ == "__main__":
    main(["report", *sys.argv[1:]])
