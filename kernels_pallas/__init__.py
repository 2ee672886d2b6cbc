"""Per-device kernels of jaxserve, on plain arrays: maths only, no sharding, no engine.

One folder an op: `api` (the function to call), `reference` (jnp: the specification), `cases` (named shapes for tests and
benchmarks), one file a backend, `tuned.json` (measured defaults). `dispatch` chooses a backend; `pallas_triton` alone
imports Pallas; `gpu_compile` compiles for a GPU on a machine without one. Imports nothing, so that
`kernels_pallas.paged_attention.work` and `.tiling` can be used without jax.
"""
