"""From the files of a data set to patches: manifest, alignment, labels, folds, loading."""
