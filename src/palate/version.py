"""The version, in one place that the build and every saved file can read without importing anything else."""

__version__ = "0.1.0"
