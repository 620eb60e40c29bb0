"""What ``hasten WORD ...`` does beside runs: a file a word, with ``main(words) -> int``, imported when needed."""
