"""Random numbers that are functions of keys: which entry of which row is drawn, never when."""
