"""From a text file to batches: corpus, tokenizer, token cache, datasets, baselines, and the LightningDataModule."""
