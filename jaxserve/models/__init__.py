"""The model families in Flax NNX, one file a family, and what they are made of."""
