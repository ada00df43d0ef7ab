"""From raw text to packed batches: sources, tokenizer, corpus on disk, packing, loader."""
