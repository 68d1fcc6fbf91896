"""Programs that try to break a run at random; see tests/README.md."""
