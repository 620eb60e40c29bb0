"""Hydra's configuration files, read as ``pkg://hasten.configs``."""
