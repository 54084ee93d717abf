"""The command `lightforcing`."""
