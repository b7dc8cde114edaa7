"""What a model is trained on: documents, tokens, packed streams."""
