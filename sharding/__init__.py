"""From what a dimension is ("vocab") to the devices that hold it. Import its modules: `from sharding.rules import spec_for`."""
