"""Which tokens of which requests the next step computes, and which KV pages they use. Pure Python."""
