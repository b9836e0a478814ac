"""The commands that a person or a scheduler starts: one file per command, and the command line."""
