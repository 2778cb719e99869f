"""Vision tokens, dropped and merged."""
