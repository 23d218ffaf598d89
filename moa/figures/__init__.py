"""Figures: PNG files that show what tables and images hold; nothing is computed here but layout."""
