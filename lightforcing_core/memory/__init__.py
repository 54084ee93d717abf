"""The memory a run needs, and what to reduce if it does not fit."""
