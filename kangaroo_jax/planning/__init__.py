"""`kangaroo plan`: what a stage needs on chips that are not here."""
