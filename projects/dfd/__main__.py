"""``python -m dfd``: the command ``dfd``, where it is not on PATH."""

from .cli import main

if __name__ == "__main__":
    main()
