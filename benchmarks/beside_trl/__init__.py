"""The two sides of trl_compare.py."""
