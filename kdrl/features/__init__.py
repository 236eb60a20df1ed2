"""Feature terms: what student and teacher hold inside (hidden states, attention) compared beside their outputs."""
