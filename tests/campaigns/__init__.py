"""Fault campaigns: programs that try many faults, and end with a line of counts."""
