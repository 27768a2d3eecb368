"""What is denoised and decoded: transformers, codecs, and the files their weights come in."""
