"""What is trained on: data sets and their synthetic fallbacks, encoders, tokenisation and batches."""
