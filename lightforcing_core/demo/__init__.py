"""The demo model that ships with the pack."""
