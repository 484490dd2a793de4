"""The library: replacements trained once against the teacher and combined freely afterwards."""
