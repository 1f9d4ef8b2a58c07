"""Neighbours: one file each. None is imported until it is asked for, so that none is needed."""
