"""make mac-check: see __main__.py."""
