"""The quickstart's generated corpus: scenes, drawings, sentences and damaged clips."""
