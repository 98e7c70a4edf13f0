#!/usr/bin/env python
"""``dfd demo``, under the name that it had before there was that command."""

import sys

from dfd.cli import main

if __name__ == "__main__":
    main(["demo", *sys.argv[1:]])
