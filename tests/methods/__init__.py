"""The published methods against their formulas."""
