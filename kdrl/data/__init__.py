"""Data made and chosen by models: `kdrl generate` writes traces, `kdrl select` keeps or weighs rows by a score."""
