from .arguments import argument_parser
from .run import main

__all__ = ["argument_parser", "main"]
