"""What comes from outside: numbers, token ids, text and tokenizers are checked here, once."""
