"""Measurements of kdrl: phases, memory, and other libraries beside it."""
