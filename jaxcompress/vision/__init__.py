"""The vision tokens of a vision-language model, dropped and merged in the tower and while the prompt is read."""
