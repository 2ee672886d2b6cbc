"""jaxserve.v1, frozen (ADR 0009): `jaxserve.proto` and its stubs. Nothing here is written by hand but the proto."""
