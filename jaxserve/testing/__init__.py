"""What tests of an engine need: a naive oracle, tiny checkpoints, a clock to turn by hand. Imported by tests alone."""
