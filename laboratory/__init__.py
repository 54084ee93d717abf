"""Quality measurements and the demo model's training: tools for developers, not part of the installed package."""
