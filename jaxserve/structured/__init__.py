"""Which tokens a request may continue with: grammars (by `llguidance`) and bad words.

A request carries a `CompiledConstraint`; the engine starts one `TokenConstraint` from it, asks for a mask a step and tells it
each token. Start reading at `constraint`; `compiler` is where a schema, a regular expression or a grammar becomes one.
"""
