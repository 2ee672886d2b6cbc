"""Text to tokens, tokens to text, messages to text.

`tokenizer` loads a model's tokenizer, `detokenizer` streams its text, `stop_strings` cuts that text, `chat_template`
renders messages. No jax here, and nothing of requests: the engine puts these together.
"""
