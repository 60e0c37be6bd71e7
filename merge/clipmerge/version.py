"""The version, where both the package and the records inside files find it."""

__version__ = "0.1.0"
