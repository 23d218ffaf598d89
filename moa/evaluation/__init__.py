"""The evaluation: what is generated, how it is scored, and how scores become tables with intervals."""
