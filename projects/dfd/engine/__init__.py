from .launch import launch
from .run import main

__all__ = ["launch", "main"]
