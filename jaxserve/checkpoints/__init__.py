"""Parameters on disk: Hugging Face directories, our own Orbax directories, and the way between the two.

Start at `load` (which of the two is it, and put it on these devices), `convert` and `hub`. Nothing in a model directory is
ever executed: no pickle is opened, no custom code is imported, no archive is unpacked.
"""
