"""External input: this package alone reads and checks numbers, token ids, text and tokenizer files."""
