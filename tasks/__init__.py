"""What to train on: data sets and their synthetic fallbacks, encoders, tokenisation, batches."""
