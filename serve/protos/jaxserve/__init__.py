"""The protos whose wire package begins with `jaxserve`."""
