"""Shared by the commands: options, parsers and error messages."""
