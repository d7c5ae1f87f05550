"""The small world of the quickstart: scenes, drawings, sentences and damaged clips."""
