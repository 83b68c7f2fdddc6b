"""One file per model library: its own loader in, a LoadedModel out."""
