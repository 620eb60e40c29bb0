"""What is written to disk for others to read. Every write is whole or not there: a temporary file, then a rename."""

from hasten.formats.files import whole_file, write_json

__all__ = ["whole_file", "write_json"]
