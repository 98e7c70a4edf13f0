"""A finished run's student in use."""

from .student import Student, load_detector, load_student

__all__ = ["Student", "load_detector", "load_student"]
