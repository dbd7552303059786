"""Models that leave: one file for each format, and the card that goes with every export."""
