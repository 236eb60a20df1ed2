"""Student and teacher of different tokenizers: their tokens of one text, aligned byte by byte."""
