"""Flax people's own checkpoints: any Orbax tree, its leaves made canonical by a mapping of names and axes.

`mapping`, `axes` and `arithmetic` are the language of the maps in `maps/`; `plan` applies one to a tree, `pieces` makes tensors;
`orbax_tree` reads a checkpoint lazily, `source` by the plan, and `checkpoint` finds what such a checkpoint lacks. Start at
`checkpoint.find_checkpoint`; for a tree in memory at `pieces.convert_in_memory`.
"""
