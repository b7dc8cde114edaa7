"""The tasks that judge a trained model, and how an answer is judged."""
