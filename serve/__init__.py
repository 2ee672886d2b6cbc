"""The front doors: the `jaxserve` command, its settings, and the services that stream tokens. The topmost layer; no jax."""
