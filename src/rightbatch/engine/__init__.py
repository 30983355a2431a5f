"""One optimizer step and its meters; knows nothing of why it runs."""
