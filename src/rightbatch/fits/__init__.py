"""Pure functions from measurements to estimates: no torch, no files, no clock, no global random state."""
