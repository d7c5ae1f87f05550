"""Charts, histograms and style of the pages that people look at."""
