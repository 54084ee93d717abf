"""The live view and the routes that the frontend calls."""
