"""`kangaroo web`: a page on which a film is shown to the model and talked about."""
