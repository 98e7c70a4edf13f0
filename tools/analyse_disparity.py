#!/usr/bin/env python
"""``dfd analyse``, under the name that it had before there was that command."""

import sys

from dfd.cli import main

if __name__ == "__main__":
    main(["analyse", *sys.argv[1:]])
