"""Where the record of a run goes: local files (the truth) and Weights & Biases."""
