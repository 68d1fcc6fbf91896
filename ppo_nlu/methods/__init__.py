"""The methods that train: one file each, with `collect` and `update`."""
