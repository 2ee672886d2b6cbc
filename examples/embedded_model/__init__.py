"""Parts of `examples/train_embedded_model.py`: corpus, model, evaluation, export."""
