"""Pure computation: no files, no mesh sizes."""
