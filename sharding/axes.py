"""The names: logical axes that tensors declare, and mesh axes that devices form.

A tensor says what a dimension *is* ("vocab"); `sharding.rules` says over which mesh axes such a dimension is cut.
"""

DATA, KV, GROUP, EXPERT = "data", "kv", "group", "expert"
MESH_AXES = (DATA, KV, GROUP, EXPERT)
"""Tensor parallelism of size t over K KV heads is `kv` = gcd(t, K) times `group` = t / kv (ADR 0004)."""

TENSOR_AXES = (KV, GROUP)
"""The pair that most tensors are cut over; its product is tensor_parallel_size."""

EMBED = "embed"
VOCAB = "vocab"
HEADS = "heads"
KV_HEADS = "kv_heads"
MLP = "mlp"
FUSED = "fused"
"""A dimension made of one block a device, such as q, k and v side by side."""
PAGES = "pages"
