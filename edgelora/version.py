"""The version: a literal, so that `edgelora --version` reads no package metadata."""

__version__ = "0.1.0"
