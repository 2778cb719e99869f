"""Input from outside: numbers, token ids, text and tokenizer files are read and checked here, and only here."""
