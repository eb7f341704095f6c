"""A tier of notebooks from one command: what runs, what is kept, and what comes of it."""
