"""From what a dimension is ("vocab") to the devices that hold it. Write `from sharding.rules import spec_for`."""
