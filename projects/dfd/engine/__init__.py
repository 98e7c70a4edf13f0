from .arguments import argument_parser
from .launch import launch
from .run import main

__all__ = ["argument_parser", "launch", "main"]
