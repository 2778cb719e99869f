"""Shorter prompts: words scored, the best kept."""
