"""From raw videos and images to a training set: scores for everything, then a choice, then annotation and export."""
