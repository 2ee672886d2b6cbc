"""Flax people's own checkpoints: any Orbax tree, its leaves made canonical by a mapping of names and axes.

`orbax_tree` reads, `mapping` and `axes` are the language of the maps in `maps/`, `plan` applies one to a tree, `source` reads by
the plan. Start at `source.FlaxTreeSource`.
"""
