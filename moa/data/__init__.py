"""From photos to training records: captions, person masks, and which words mean whom."""
